"""`Queue`: one worker's side of a shard: claim, append, finish, release, reap, leases.

Each call is one Lua script that is safe to run twice, so a call that failed on the way is simply
made again. What a worker runs is fenced by its epoch: whoever was declared dead learns it from the
verdict of its next write and drops the request.
"""

import enum
import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import InvalidRequest, Words
from tokenmill.producer.keys import Keys
from tokenmill.producer.scripts import Script
from tokenmill.producer.wire import (
    FINISH_REASONS,
    Request,
    Usage,
    WorkerInfo,
    pack_token_ids,
    unpack_token_ids,
)
from tokenmill.worker.plain_inbox import PlainInbox

#: Most requests in one append or finish call: keeps the server blocked for well under 1 ms.
MAX_BATCH = 64
#: A claim passes over at most this many ended references before it returns to the server.
MAX_SCAN = 256
#: Most requests that one reap call moves.
MAX_REAP = 500
#: Longest error text kept with a request, in characters.
MAX_REASON = 1000

_Item = TypeVar("_Item")

#: Fields of a registration that are plain text.
_REGISTERED = (
    *("model", "host", "pid", "started_ms", "version"),
    *("quantization", "kv_cache_dtype"),
)
_LEASE = Script("tokenmill.worker", "lease")
_CLAIM = Script("tokenmill.worker", "claim")
_APPEND = Script("tokenmill.worker", "append")
_FINISH = Script("tokenmill.worker", "finish")
_RELEASE = Script("tokenmill.worker", "release")
_REAP = Script("tokenmill.worker", "reap")
_DISOWN = Script("tokenmill.worker", "disown")


class Verdict(enum.Enum):
    """What became of a write."""

    #: Written, now or by an earlier try.
    OK = "OK"
    #: The request is no longer this worker's: drop it, write nothing more.
    FENCED = "FENCED"
    #: Not written; the producer wants no more: `finish` it as cancelled.
    CANCEL = "CANCEL"
    #: Not written; the server's offset is another (it rolled back, or an earlier try was split
    #: otherwise): `release` it with `undo`, and the next claim goes on from the server's offset.
    GAP = "GAP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A request that this worker now runs."""

    request_id: str
    #: Goes with every write.
    epoch: int
    #: Tokens already committed: the first token to generate has the offset `len(token_ids)`.
    token_ids: tuple[int, ...]
    #: Counts this one: 1 for the first try.
    attempts: int
    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """Tokens to commit. With no tokens it only asks for the verdict."""

    request_id: str
    epoch: int
    #: Token offset of the first of `token_ids`.
    start: int
    token_ids: tuple[int, ...]
    text: str
    #: `chain_digest` of all tokens up to the end of these.
    digest: str
    #: `pack_logprobs` of these tokens, and of the prompt with the first ones, where asked for.
    logprobs: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of a request, with the tokens not yet committed."""

    request_id: str
    epoch: int
    start: int
    token_ids: tuple[int, ...] = ()
    #: The rest of the text; may be there without tokens.
    text: str = ""
    digest: str = ""
    logprobs: bytes = b""
    finish_reason: str
    reason: str = ""
    usage: Usage


class Queue:
    """One worker's side of one shard. Threads may share it, except that one thread alone waits.

    `server` runs the scripts; `blocking` is its own connection for `wait`
    (`connect(url, blocking=True)`). A worker id is never used again after the process is gone.
    """

    def __init__(
        self,
        server: redis.Redis,
        keys: Keys,
        worker_id: str,
        *,
        blocking: redis.Redis | None = None,
        lease_ms: int = 15_000,
        max_attempts: int = 5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.keys = keys
        self.worker_id = worker_id
        self.lease_ms = lease_ms
        self._max_attempts = max_attempts
        self._server = server
        self._blocking = blocking if blocking is not None else server
        self._info: WorkerInfo | None = None
        #: Number of the next claim; a claim whose answer was lost is repeated under its number.
        self._claim_seq = 1
        #: Last entry seen of the control stream; "" before the first claim.
        self._control_id = ""
        #: When the next parked request is due, as the last claim saw it: what was due by then it
        #: has looked at, and what is parked later is heard of. None: there was none.
        self._due_at: float | None = None
        #: Whether the last claim left nothing that anybody could claim then.
        self.is_drained = False
        #: Entries of the inbox at the last claim.
        self.num_inbox = 0
        #: One shard has no others: that it is away is told by every call.
        self.is_whole, self.is_reachable_in_part = True, False
        #: What the server takes for this worker's and it did not run, at the last look.
        self._strays: set[str] = set()
        self._plain = PlainInbox(server, keys)

    def register(self, info: WorkerInfo) -> None:
        """Say who this worker is and take a lease; `renew` repeats it."""
        self._info = info
        self.renew()

    def renew(self) -> None:
        """Extend the lease without claiming or writing: for an engine with nothing to do."""
        self._lease(self.lease_ms)

    def wake(self) -> None:
        """End the `wait` of every worker of this shard, and renew the lease."""
        self._lease(self.lease_ms, is_waking=True)

    def claim(
        self,
        *,
        sequences: int,
        tokens: int,
        kv_tokens: int,
        kv_total: int = 0,
        kv_each: int = 0,
        limit: int = MAX_BATCH,
        holds: int = 0,
    ) -> list[Claim]:
        """Take what fits: at most `sequences` and `limit` requests, while prompt tokens are left.

        The last one may overshoot `tokens`, since prompts are split over steps, but none may
        overshoot `kv_tokens` (prompt, committed and the next 256 tokens), unless this worker runs
        nothing at all. One that overshoots `kv_total`, the KV tokens of a worker that runs nothing
        (0: unknown), is claimed at once: it would block the queue, so the engine has to refuse it.
        `kv_each` are the KV tokens that one request holds at the most (0: no bound), `holds` the
        requests that this worker runs of other shards. Renews the lease. If it
        raises, call it again: nothing is lost.
        """
        while True:
            more, rows, now_ms, num_inbox, control_id, left, due = self._run(
                _CLAIM,
                self.worker_id,
                self.lease_ms,
                self._claim_seq,
                sequences,
                tokens,
                kv_tokens,
                limit,
                MAX_SCAN,
                self._max_attempts,
                kv_total,
                holds,
                kv_each,
            )
            claims = [claim for row in rows if (claim := self._checked(row))]
            self._claim_seq += 1  # only now: whatever failed above is claimed again as it was
            self.num_inbox, self.is_drained = num_inbox, not left
            self._due_at = self._clock() + (float(due) - now_ms) / 1000 if due else None
            self._control_id = control_id.decode()
            if claims or not more:
                return claims

    def admit(self) -> int:
        """Enqueue or refuse some of what came by the inbox; returns how many were looked at."""
        return self._plain.take()

    def append(self, appends: Sequence[Append]) -> list[Verdict]:
        """Commit tokens of up to `MAX_BATCH` requests, one verdict each. Renews the lease.

        After an error repeat the call with the same appends: what was committed is not again.
        """
        arguments: list[str | bytes | int] = []
        for item in _batch(appends):
            arguments += (item.request_id, item.epoch, *_tokens(item))
        return self._verdicts(_APPEND, arguments)

    def finish(self, ends: Sequence[Finish]) -> list[Verdict]:
        """End up to `MAX_BATCH` requests, each with its last tokens and its one terminal entry.

        Verdicts: OK, FENCED or GAP, as for `append`; a repeat is OK.
        """
        arguments: list[str | bytes | int] = []
        for item in _batch(ends):
            if item.finish_reason not in FINISH_REASONS:
                expected = ", ".join(sorted(FINISH_REASONS))
                raise InvalidRequest("finish_reason", expected, item.finish_reason)
            arguments += (item.request_id, item.epoch, *_tokens(item))
            arguments += (item.finish_reason, item.reason[:MAX_REASON], item.usage.prompt_tokens)
        return self._verdicts(_FINISH, arguments)

    def release(
        self, request_id: str, epoch: int, *, undo: bool, delay_ms: int = 0, reason: str = ""
    ) -> Verdict:
        """Give a request back, to be claimed again by any worker.

        `undo` does not count the attempt (a drain); otherwise, without `delay_ms`, the delay grows
        from 1 s to 60 s with the attempts. `reason` is kept as its last error.
        """
        cut = reason[:MAX_REASON]
        given = (request_id, epoch, int(undo), max(delay_ms, 0), cut, self.worker_id)
        reply = self._run(_RELEASE, *given)
        return Verdict(reply.decode())

    def reap(self) -> int:
        """Park what dead workers ran and end what is overdue; returns how many were moved."""
        return int(self._run(_REAP, MAX_REAP))

    def disown(self, held: Collection[str]) -> int:
        """Park what the server takes for this worker's and is not in `held`, the ids it runs.

        Only what was so at the last call too: a claim may be on its way. Returns how many.
        """
        owned: Any = self._server.smembers(self.keys.own(self.worker_id))
        strays = {name.decode() for name in owned}.difference(held)
        again, self._strays = sorted(strays & self._strays)[:MAX_REAP], strays
        return int(self._run(_DISOWN, self.worker_id, *again)) if again else 0

    def wait(self, timeout_s: float) -> bool:
        """Block until something may be claimed, at most `timeout_s`; True: claim now.

        What was parked and due at the last claim does not end it: that claim left it behind.
        It begins where the last claim looked; before the first claim it returns at once.
        """
        if not self.has_claimed:
            newest: Any = self._server.xrevrange(self.keys.control, count=1)
            self._control_id = newest[0][0].decode() if newest else "0-0"
            return True
        due_ms = self.next_due_ms()
        block_ms = int(min(timeout_s, MAX_BLOCK_S) * 1000)
        if due_ms is not None:
            block_ms = min(block_ms, due_ms)
        if block_ms <= 0:  # to the server, 0 would mean to block for ever
            return True
        # One entry of each, as those of the inbox are large.
        reply: Any = self._blocking.xread(self.watched(), count=1, block=block_ms)
        for name, entries in reply or ():
            self.heard(name.decode(), entries[-1][0].decode())
        return bool(reply) or (due_ms is not None and due_ms <= block_ms)

    @property
    def has_claimed(self) -> bool:
        """Whether it is known from where on to wait."""
        return bool(self._control_id)

    def watched(self) -> dict[Any, Any]:
        """The streams that something new is heard of by, and the last entries seen."""
        return {self.keys.control: self._control_id, self.keys.inbox: self._plain.seen}

    def heard(self, key: str, entry_id: str) -> None:
        """An entry of a watched stream was seen."""
        if key == self.keys.control:
            self._control_id = entry_id

    def next_due_ms(self) -> int | None:
        """Until the next parked request is due; what was due at the last claim does not count."""
        if self._due_at is None:
            return None
        left_s = min(max(self._due_at - self._clock(), 0.0), 86_400.0)  # it may be infinite
        return math.ceil(left_s * 1000)

    def retire(self) -> None:
        """Take back the registration; what was not released is parked for others."""
        self._info = None
        self._lease(0)
        self.reap()

    def _checked(self, row: list[Any]) -> Claim | None:
        """The claim of a row; a payload that cannot be read ends as an error, alone."""
        request_id, epoch, attempts, payload, packed = row
        token_ids = unpack_token_ids(packed)
        try:
            request = Request.unpack(payload or b"")
        except Exception as error:  # noqa: BLE001 - no bytes of strangers may end a worker
            is_ours = isinstance(error, InvalidRequest)
            unread = InvalidRequest("payload", "a readable request", Words(type(error).__name__))
            reason = str(error if is_ours else unread)
            end = Finish(
                request_id=request_id.decode(),
                epoch=epoch,
                start=len(token_ids),
                finish_reason="error",
                reason=reason,
                usage=Usage(prompt_tokens=0, completion_tokens=len(token_ids)),
            )
            self.finish([end])
            return None
        return Claim(
            request_id=request_id.decode(),
            epoch=epoch,
            token_ids=token_ids,
            attempts=attempts,
            request=request,
        )

    def _lease(self, lease_ms: int, *, is_waking: bool = False) -> None:
        fields: list[str] = []
        if self._info is not None:
            for name in _REGISTERED:
                fields += [name, str(getattr(self._info, name))]
            fields += ["adapters", json.dumps(self._info.adapters)]
        self._run(_LEASE, self.worker_id, lease_ms, int(is_waking), *fields)

    def _verdicts(self, script: Script, arguments: list[str | bytes | int]) -> list[Verdict]:
        reply = self._run(script, self.worker_id, self.lease_ms, *arguments)
        return [Verdict(item.decode()) for item in reply]

    def _run(self, script: Script, *arguments: str | bytes | int) -> Any:
        return script(self._server, self.keys.tag, arguments)


def _batch(items: Sequence[_Item]) -> Sequence[_Item]:
    if len(items) > MAX_BATCH:
        raise InvalidRequest("batch", f"at most {MAX_BATCH} requests a call", len(items))
    return items


def _tokens(item: Append | Finish) -> tuple[int, int, bytes, str, str, bytes]:
    packed = pack_token_ids(item.token_ids)
    return item.start, len(item.token_ids), packed, item.text, item.digest, item.logprobs
