"""`ShardReader`: blocking reads of streams of several shards at once, in one thread.

A cluster refuses one XREAD over two slots. So each shard has a connection of its own, a read is
sent on each, and the thread waits for whichever is answered first; the others stay sent, and are
answered to a later call. Nothing is lost by that: a reader's position is what it has been given.

A stream that is added to a shard whose read has been sent already has to wait for that to end, so
such reads are cut short while streams are being added, and one that was to last is given up.
"""

import logging
import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

SHARD_LOST = "shard_lost"
SHARD_BACK = "shard_back"
#: Longest that a read is sent for, in ms.
BLOCK_MS = 5000
#: The same while streams are being added.
SLICE_MS = 50
#: Streams count as being added for so long after one was.
CHANGING_S = 5.0
#: A read that is not answered so long after its end never will be.
_PATIENCE_S = 10.0
#: Calls with less time than this ask for what is there, and wait for the answer.
_AT_ONCE_MS = 5
_AT_ONCE_S = 1.0
_BACKOFF_S = (0.05, 2.0)

log = logging.getLogger(__name__)

#: As the client library gives them: stream, and entry ids with their fields.
Rows = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]


@dataclass(slots=True)
class _Read:
    """A read that was sent."""

    streams: dict[str, str]
    #: When the server answers at the latest.
    ends_at: float
    is_at_once: bool


class _Shard:
    """One shard's connection and the read that was sent on it."""

    def __init__(self, number: int, server: redis.Redis) -> None:
        pool = server.connection_pool
        self.number = number
        #: Not one of the pool: it stays taken between two calls.
        self.connection: Any = pool.connection_class(**pool.connection_kwargs)
        self.read: _Read | None = None
        self.changed_at = float("-inf")
        self.retry_at = float("-inf")
        self.failures = 0

    @property
    def socket(self) -> Any:
        return self.connection._sock  # noqa: SLF001 - the library has no other way to wait

    def send(self, streams: dict[str, str], count: int, block_ms: int, now: float) -> None:
        """Send a read; 0 does not block."""
        block = ("BLOCK", block_ms) if block_ms else ()
        ids = [streams[key] for key in streams]
        command = ("XREAD", "COUNT", count, *block, "STREAMS", *streams, *ids)
        self.connection.send_command(*command)
        self.read = _Read(dict(streams), now + block_ms / 1000, is_at_once=not block_ms)

    def drop(self) -> None:
        """Give up what was sent."""
        self.read = None
        self.connection.disconnect()


class ShardReader:
    """Reads the streams of many shards. One thread at a time."""

    def __init__(
        self,
        servers: Sequence[redis.Redis],
        shard_of: Callable[[str], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`servers` come from `connect(url, blocking=True, key=...)`; `shard_of` takes a key."""
        self._servers = servers
        self._shards: dict[int, _Shard] = {}
        self._shard_of = shard_of
        self._clock = clock

    def close(self) -> None:
        """Close the connections."""
        for shard in self._shards.values():
            shard.drop()

    def xread(
        self, streams: Mapping[Any, Any], count: int | None = None, block: int | None = None
    ) -> Rows:
        """Entries after the given ids, waiting `block` ms for the first; may be empty.

        As on one server, but of several shards one that does not answer is no error: the others
        are read, and that one is tried again. It is logged once.

        Raises:
            RedisError: a server answers that it cannot do this.
        """
        count, block = count or 1, block or 1
        wanted: dict[int, dict[str, str]] = {}
        for key, entry_id in streams.items():
            wanted.setdefault(self._shard_of(key), {})[key] = entry_id
        if len(wanted) == 1:  # one server can wait by itself
            reply: Any = self._servers[next(iter(wanted))].xread(dict(streams), count, block)
            return reply or []
        deadline = self._clock() + max(block, 1) / 1000
        if block <= _AT_ONCE_MS:
            return self._read_at_once(wanted, streams, count)
        while True:
            waiting = self._ask_all(wanted, count, is_at_once=False)
            rows = self._gather(waiting, streams, deadline)
            if rows or self._clock() >= deadline:
                return rows

    def _read_at_once(
        self, wanted: Mapping[int, dict[str, str]], streams: Mapping[Any, Any], count: int
    ) -> Rows:
        """What is there; a server that would have to be waited for is given a second."""
        asked = self._ask_all(wanted, count, is_at_once=True)
        rows: Rows = []
        deadline = self._clock() + _AT_ONCE_S
        while waiting := [shard for shard in asked if shard.read and shard.read.is_at_once]:
            rows += self._gather(waiting, streams, deadline)
            if self._clock() >= deadline:
                break
        # Those sent to wait have been answered by now if there was anything.
        waiting = [shard for shard in asked if shard.read and not shard.read.is_at_once]
        return rows + self._gather(waiting, streams, self._clock())

    def _ask_all(
        self, wanted: Mapping[int, dict[str, str]], count: int, *, is_at_once: bool
    ) -> list[_Shard]:
        for number, streams in wanted.items():
            if number not in self._shards:
                self._shards[number] = _Shard(number, self._servers[number])
            self._ask(self._shards[number], streams, count, is_at_once=is_at_once)
        return [self._shards[number] for number in wanted if self._shards[number].read]

    def _ask(self, shard: _Shard, streams: dict[str, str], count: int, *, is_at_once: bool) -> None:
        now = self._clock()
        if shard.read and now > shard.read.ends_at + _PATIENCE_S:
            self._lost(shard, RedisTimeoutError("a read was not answered"))
        if shard.read and not streams.keys() <= shard.read.streams.keys():
            shard.changed_at = now
            if is_at_once or shard.read.ends_at - now > SLICE_MS / 1000:
                shard.drop()
        if shard.read or now < shard.retry_at:
            return
        block_ms = SLICE_MS if now - shard.changed_at < CHANGING_S else BLOCK_MS
        try:
            shard.send(streams, count, 0 if is_at_once else block_ms, now)
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            self._lost(shard, error)

    def _gather(
        self, waiting: Sequence[_Shard], streams: Mapping[Any, Any], deadline: float
    ) -> Rows:
        """What has been answered, waiting for the first."""
        rows: Rows = []
        for shard in self._readable(waiting, deadline):
            try:
                if not shard.connection.can_read(0):  # of TLS, and no answer
                    continue
                reply = shard.connection.read_response()
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                self._lost(shard, error)
                continue
            except redis.RedisError:
                shard.read = None
                raise
            self._back(shard)
            sent, shard.read = shard.read, None
            for key, entries in reply or ():
                # A stream that was left, or is read from elsewhere by now, is not answered for.
                name = key.decode()
                if sent and streams.get(name) == sent.streams[name]:
                    rows.append((key, [(entry_id, _fields(flat)) for entry_id, flat in entries]))
        return rows

    def _readable(self, waiting: Sequence[_Shard], deadline: float) -> list[_Shard]:
        poll, by_fd = select.poll(), {}
        for shard in waiting:
            by_fd[shard.socket.fileno()] = shard
            poll.register(shard.socket, select.POLLIN)
        now = self._clock()
        # A shard that is to be tried again, or is late, ends the wait too.
        times = [deadline, *(s.retry_at for s in self._shards.values() if s.retry_at > now)]
        times += [s.read.ends_at + _PATIENCE_S for s in waiting if s.read]
        left_ms = max(min(times) - now, 0.0) * 1000
        return [by_fd[fd] for fd, _ in poll.poll(left_ms + 1 if left_ms else 0)]

    def _lost(self, shard: _Shard, error: Exception) -> None:
        shard.drop()
        if not shard.failures:
            log.warning("%s: %d: %s; retrying until it is back", SHARD_LOST, shard.number, error)
        low, high = _BACKOFF_S
        shard.retry_at = self._clock() + min(low * 2 ** min(shard.failures, 10), high)
        shard.failures += 1

    def _back(self, shard: _Shard) -> None:
        if shard.failures:
            shard.failures = 0
            log.warning("%s: %d", SHARD_BACK, shard.number)


def _fields(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
