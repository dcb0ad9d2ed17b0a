"""`ShardedQueue`: one worker's side of a queue of several shards, like that of one.

    claim            one shard after another, beginning where something was heard of, and else
                     where the last call ended; the first that has something fills the room.
                     A shard that was empty is not asked until something is heard of it
    append, finish   one call to each shard that is concerned
    leases           on every shard, also when another does not answer
    disown, reap     on those that answered last; one that was away is reaped a lease later, when
                     the others have renewed theirs there
    wait             one read on each shard's control stream at once

So no shard waits for more than as many claims as there are shards, and inside a shard all is as
with one: priorities, tenants and their weights hold there, and for the whole as far as requests
are spread evenly, which their ids are.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

from redis.exceptions import RedisError

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.refusals import is_about_the_server
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import WorkerInfo
from tokenmill.worker.outage import BACKOFF_S
from tokenmill.worker.queue import MAX_BATCH, Append, Claim, Finish, Queue, Verdict

#: How often shards of which nothing is heard are asked all the same.
LOOK_S = 1.0

_Write = TypeVar("_Write", Append, Finish)
_Reply = TypeVar("_Reply")


class QueueLike(Protocol):
    """A worker's side of a queue, of one shard or several: see `Queue`."""

    num_inbox: int

    @property
    def is_whole(self) -> bool: ...
    @property
    def is_reachable_in_part(self) -> bool: ...
    @property
    def worker_id(self) -> str: ...
    @property
    def lease_ms(self) -> int: ...
    def register(self, info: WorkerInfo) -> None: ...
    def renew(self) -> None: ...
    def wake(self) -> None: ...
    def claim(
        self,
        *,
        sequences: int,
        tokens: int,
        kv_tokens: int,
        kv_total: int = 0,
        kv_each: int = 0,
        limit: int = MAX_BATCH,
    ) -> list[Claim]: ...
    def admit(self) -> int: ...
    def append(self, appends: Sequence[Append]) -> list[Verdict]: ...
    def finish(self, ends: Sequence[Finish]) -> list[Verdict]: ...
    def release(
        self, request_id: str, epoch: int, *, undo: bool, delay_ms: int = 0, reason: str = ""
    ) -> Verdict: ...
    def reap(self) -> int: ...
    def disown(self, held: Collection[str]) -> int: ...
    def wait(self, timeout_s: float) -> bool: ...
    def retire(self) -> None: ...


def queue_of(shards: Shards, worker_id: str, **options: Any) -> QueueLike:
    """The queue of these shards for one worker; `options` as for `Queue`."""
    queues = [
        Queue(server, keys, worker_id, blocking=shards.blocking(keys.shard), **options)
        for keys, server in shards
    ]
    return queues[0] if len(queues) == 1 else ShardedQueue(shards, queues)


class ShardedQueue:
    """One worker's side of several shards. Threads may share it as they may a `Queue`."""

    def __init__(
        self,
        shards: Shards,
        queues: Sequence[Queue],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`queues` are this worker's sides of each shard."""
        self._shards = shards
        self._queues = queues
        self._reader = shards.reader()
        self.worker_id = queues[0].worker_id
        self.lease_ms = queues[0].lease_ms
        #: Entries of the inboxes, each at the last claim from its shard.
        self.num_inbox = 0
        #: Shards that had nothing for anybody, and of which nothing has been heard since.
        self._quiet: set[int] = set()
        self._clock = clock
        self._look_at = clock()
        #: Shards that did not answer the last call: how often since they did, and when they are
        #: asked for work again.
        self._away: dict[int, tuple[int, float]] = {}
        #: When shards that were away answered again.
        self._back_at: dict[int, float] = {}
        #: Shards in the order in which they are asked next.
        self._order = list(range(len(queues)))
        #: What this worker runs: a request that fits no room is only for one that runs nothing.
        self._held: set[str] = set()

    def register(self, info: WorkerInfo) -> None:
        self._each(lambda queue: queue.register(info))

    def renew(self) -> None:
        self._each(lambda queue: queue.renew())

    def wake(self) -> None:
        self._each(lambda queue: queue.wake())

    def retire(self) -> None:
        self._each(lambda queue: queue.retire())

    def reap(self) -> int:
        """As for `Queue`, on the shards that have answered for a lease."""
        since = self._clock() - self.lease_ms / 1000
        settled = [q for q in self._here() if self._back_at.get(q.keys.shard, -math.inf) < since]
        return sum(self._each(lambda queue: queue.reap(), settled))

    def disown(self, held: Collection[str]) -> int:
        """As for `Queue`, on the shards that answer."""
        return sum(self._each(lambda queue: queue.disown(held), self._here()))

    def claim(
        self,
        *,
        sequences: int,
        tokens: int,
        kv_tokens: int,
        kv_total: int = 0,
        kv_each: int = 0,
        limit: int = MAX_BATCH,
    ) -> list[Claim]:
        """As for `Queue`; what one shard has leaves the others to the next call.

        What comes to a shard that was empty is found after `wait` has heard of it. One that is away
        is asked more and more rarely.

        Raises:
            RedisError: no shard gave anything, and one that was asked did not answer.
        """
        lost: RedisError | None = None
        claims: list[Claim] = []
        self._stir()
        for number in [number for number in self._order if self._is_to_be_asked(number)]:
            self._order.remove(number)
            self._order.append(number)
            queue = self._queues[number]
            try:
                claims = queue.claim(
                    sequences=sequences,
                    tokens=tokens,
                    kv_tokens=kv_tokens,
                    kv_total=kv_total,
                    kv_each=kv_each,
                    limit=limit,
                    holds=len(self._held),
                )
            except RedisError as error:
                lost = error
                self._missed(number)
                continue
            self._answered(number)
            if queue.is_drained:
                self._quiet.add(number)
            if claims:
                self._held.update(claim.request_id for claim in claims)
                break
        self.num_inbox = sum(queue.num_inbox for queue in self._queues)
        if lost and not claims:
            raise lost
        return claims

    def admit(self) -> int:
        return sum(queue.admit() for queue in self._here() if queue.num_inbox)

    def append(self, appends: Sequence[Append]) -> list[Verdict]:
        return self._write(appends, lambda queue, some: queue.append(some), {Verdict.FENCED})

    def finish(self, ends: Sequence[Finish]) -> list[Verdict]:
        done = {Verdict.OK, Verdict.FENCED}
        return self._write(ends, lambda queue, some: queue.finish(some), done)

    def release(
        self, request_id: str, epoch: int, *, undo: bool, delay_ms: int = 0, reason: str = ""
    ) -> Verdict:
        queue = self._queues[self._shards.number_of(request_id)]
        verdict = queue.release(request_id, epoch, undo=undo, delay_ms=delay_ms, reason=reason)
        self._held.discard(request_id)
        return verdict

    def wait(self, timeout_s: float) -> bool:
        """As for `Queue`; the shard that was heard of is asked first."""
        block_s = min(timeout_s, MAX_BLOCK_S)
        streams: dict[Any, Any] = {}
        due: list[tuple[float, int]] = []
        for number, queue in enumerate(self._queues):
            if number in self._away:
                due.append((self._away_s(number), number))
            elif not queue.has_claimed:
                return queue.wait(0)
            if queue.has_claimed:
                streams |= queue.watched()
            left_ms = queue.next_due_ms()
            if left_ms is not None:
                due.append((left_ms / 1000, number))
        first_s, first = min(due, default=(block_s, -1))
        if not streams:  # none has answered yet
            return self._queues[first].wait(0)
        if first_s > 0:
            # The reader asks for what is there if it has no time: a due request is not that.
            block_ms = max(int(min(block_s, first_s) * 1000), 6)
            rows = self._reader.xread(streams, count=1, block=block_ms)
            for name, entries in rows or ():
                heard = self._queues[self._number_of(name.decode())]
                heard.heard(name.decode(), entries[-1][0].decode())
                self._ask_first(heard.keys.shard)
            if rows:
                return True
        if first >= 0 and first_s <= block_s:
            self._ask_first(first)
            return True
        return False

    @property
    def is_whole(self) -> bool:
        """Whether every shard has answered the last call to it."""
        return not self._away

    @property
    def is_reachable_in_part(self) -> bool:
        """Whether some shards answer, and others do not."""
        return 0 < len(self._away) < len(self._queues)

    def _is_to_be_asked(self, number: int) -> bool:
        return number not in self._quiet and self._away_s(number) <= 0

    def _away_s(self, number: int) -> float:
        """Until a shard that is away is asked for work again."""
        _, retry_at = self._away.get(number, (0, -math.inf))
        return max(retry_at - self._clock(), 0.0)

    def _here(self) -> list[Queue]:
        return [queue for queue in self._queues if queue.keys.shard not in self._away]

    def _answered(self, number: int) -> None:
        if self._away.pop(number, None) is not None:
            self._back_at[number] = self._clock()

    def _missed(self, number: int) -> None:
        failures = self._away.get(number, (0, 0.0))[0]
        low, high = BACKOFF_S
        self._away[number] = (
            failures + 1,
            self._clock() + min(low * 2.0 ** min(failures, 16), high),
        )

    def _stir(self) -> None:
        """Now and then ask all: a server that rolled back may have lost what was to be heard."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._quiet.clear()

    def _ask_first(self, number: int) -> None:
        self._quiet.discard(number)
        self._order.remove(number)
        self._order.insert(0, number)

    def _number_of(self, key: str) -> int:
        return next(q.keys.shard for q in self._queues if key.startswith(q.keys.tag))

    def _write(
        self,
        items: Sequence[_Write],
        write: Callable[[Queue, Sequence[_Write]], list[Verdict]],
        lets_go: set[Verdict],
    ) -> list[Verdict]:
        """Write each shard's part, also after one has failed: a repeat does no harm."""
        parts = self._shards.split((item.request_id, n) for n, item in enumerate(items))
        verdicts: dict[int, Verdict] = {}

        def part(queue: Queue) -> None:
            places = parts[queue.keys.shard]
            given = write(queue, [items[n] for n in places])
            verdicts.update(zip(places, given, strict=True))

        self._each(part, [queue for queue in self._queues if queue.keys.shard in parts])
        gone = {items[n].request_id for n, verdict in verdicts.items() if verdict in lets_go}
        self._held -= gone
        return [verdicts[n] for n in range(len(items))]

    def _each(
        self, call: Callable[[Queue], _Reply], queues: Sequence[Queue] | None = None
    ) -> list[_Reply]:
        """Call it for every shard, or for some; the first error is raised when all were tried."""
        replies, errors = [], []
        for queue in self._queues if queues is None else queues:
            try:
                replies.append(call(queue))
            except RedisError as error:
                errors.append(error)
                if is_about_the_server(error):
                    self._missed(queue.keys.shard)
            else:
                self._answered(queue.keys.shard)
        if errors:
            raise errors[0]
        return replies
