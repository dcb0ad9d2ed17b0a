"""`Operator`: look at a queue, set its limits, pause it, purge it, and see to its dead letters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import redis
from redis.exceptions import ResponseError

from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.keys import Keys
from tokenmill.producer.scripts import Script
from tokenmill.producer.wire import PRIORITIES, check_name

MAX_TTL_S = 10 * 365 * 86_400
#: References or ids that one call of a script goes through.
_BATCH = 500
#: Outputs that one call joins: each may be long.
_COMPACTED = 8
#: A dead letter that is tried again has at least so long.
_REVIVED_S = 86_400
#: Lanes looked at for the oldest waiting request.
_LANES = 100

_PURGE = Script("tokenmill.producer", "purge")
_UNPARK = Script("tokenmill.producer", "unpark")
_REVIVE = Script("tokenmill.producer", "revive")
_BURY = Script("tokenmill.producer", "bury")
_COMPACT = Script("tokenmill.producer", "compact")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatus:
    """What a queue holds at one moment."""

    queue: str
    paused: bool
    #: Requests that have not ended: waiting + running + parked.
    live: int
    waiting: int
    running: int
    #: Due again later: released, failed, or left by a dead worker.
    parked: int
    #: In the plain inbox, not looked at yet.
    inbox: int
    dead: int
    workers: int
    #: Since the longest waiting request was enqueued; 0 if none waits.
    oldest_s: float
    #: Requests of each tenant that have not ended.
    tenants: Mapping[str, int] = field(default_factory=dict)
    #: What was set by an operator, by its name in the server.
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A request that ended as an error."""

    request_id: str
    tenant: str
    attempts: int
    reason: str
    #: Unix time in ms.
    died_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """What a purge found."""

    cancelled: int = 0
    #: References that no enqueue wrote, dropped, and lanes that are no streams, left as they are.
    foreign: int = 0

    def __add__(self, other: "Purged") -> "Purged":
        return Purged(
            cancelled=self.cancelled + other.cancelled, foreign=self.foreign + other.foreign
        )


class Operator:
    """The operator's side of one shard of a queue."""

    def __init__(self, server: redis.Redis, keys: Keys) -> None:
        self._server = server
        self._keys = keys

    def status(self) -> QueueStatus:
        """What the queue holds."""
        keys = self._keys
        seconds, micros = self._server.time()
        now_ms = seconds * 1000 + micros // 1000
        # No transaction: a number may be a moment older than the next.
        live, parked = int(self._server.zcard(keys.live)), int(self._server.zcard(keys.park))
        names: Any = self._server.zrange(keys.workers, 0, -1)
        running = sum(int(self._server.scard(keys.own(name.decode()))) for name in names)
        settings = _text_map(self._server.hgetall(keys.settings))
        tenants = _text_map(self._server.hgetall(keys.tenants))
        return QueueStatus(
            queue=keys.queue,
            paused=settings.get("paused", "0") != "0",
            live=live,
            waiting=max(live - parked - running, 0),
            running=running,
            parked=parked,
            inbox=int(self._server.xlen(keys.inbox)),
            dead=int(self._server.xlen(keys.dead)),
            workers=int(self._server.zcount(keys.workers, now_ms, "+inf")),
            oldest_s=self._oldest_s(now_ms),
            tenants={name: int(count) for name, count in tenants.items()},
            settings={name: value for name, value in settings.items() if name != "paused"},
        )

    def configure(
        self,
        *,
        max_live: int | None = None,
        result_ttl_s: float | None = None,
        dead_ttl_s: float | None = None,
        weights: Mapping[str, float] | None = None,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        """Set limits of the whole queue; what is None stays as it is.

        Unset, the scripts take 1,000,000 live requests, results for a day, dead letters for a week,
        the weight 1, and no quota. A quota of 0 is none.

        Raises:
            InvalidRequest: a value out of bounds; then nothing was set.
        """
        settings: dict[Any, Any] = {}
        if max_live is not None:
            settings["max_live"] = _within("max_live", max_live, 1, 10**9)
        for name, ttl_s in (("result_ttl", result_ttl_s), ("dead_ttl", dead_ttl_s)):
            if ttl_s is not None:
                settings[f"{name}_ms"] = int(_within(f"{name}_s", ttl_s, 0.001, MAX_TTL_S) * 1000)
        for tenant, weight in (weights or {}).items():
            name = f"weight:{check_name('tenant', tenant)}"
            settings[name] = _within(f"weight of {tenant}", weight, 0.001, 1000)
        for tenant, quota in (quotas or {}).items():
            name = f"quota:{check_name('tenant', tenant)}"
            settings[name] = _within(f"quota of {tenant}", quota, 0, 10**9)
        if settings:
            self._server.hset(self._keys.settings, mapping=settings)

    def pause(self) -> None:
        """Give workers nothing more; what runs goes on, and requests are still taken in."""
        self._server.hset(self._keys.settings, "paused", "1")

    def resume(self) -> None:
        """Undo `pause`."""
        self._server.hdel(self._keys.settings, "paused")
        self._server.xadd(self._keys.control, {"t": "wake"}, maxlen=1000)

    def purge(self, *, tenant: str = "", priority: int | None = None) -> Purged:
        """Cancel what waits or is parked now, of all or of one tenant or priority.

        What runs is left alone, and so is what is enqueued meanwhile.
        """
        if tenant:
            check_name("tenant", tenant)
        if priority is not None and priority not in PRIORITIES:
            raise InvalidRequest("priority", "0, 1 or 2", priority)
        wanted = PRIORITIES if priority is None else (priority,)
        parked: Any = self._server.zrange(self._keys.park, 0, -1)
        lanes = [lane for some in wanted for lane in self._lanes(some, tenant)]
        total = Purged()
        for each, name, last in lanes:
            total += self._purge_lane(each, name, last)
        which = "" if priority is None else str(priority)
        for ids in _batches(name.decode() for name in parked):
            cancelled = _UNPARK(self._server, self._keys.tag, [tenant, which, *ids])
            total += Purged(cancelled=int(cancelled))
        return total

    def _lanes(self, priority: int, tenant: str) -> Iterator[tuple[int, str, str]]:
        """Priority, tenant and last reference of each lane; "" of one that is no stream."""
        names: Any = self._server.zrange(self._keys.lanes(priority), 0, -1)
        chosen = [name.decode() for name in names if tenant in ("", name.decode())]
        for some in _batches(chosen):
            with self._server.pipeline(transaction=False) as pipeline:
                for name in some:
                    pipeline.xrevrange(self._keys.lane(priority, name), count=1)
                replies = pipeline.execute(raise_on_error=False)
            for name, reply in zip(some, replies, strict=True):
                if isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE"):
                    yield priority, name, ""
                elif isinstance(reply, Exception):
                    raise reply
                elif reply:
                    yield priority, name, reply[0][0].decode()

    def _purge_lane(self, priority: int, tenant: str, last: str) -> Purged:
        total = Purged(foreign=int(not last))
        looked_at = _BATCH if last else 0
        while looked_at == _BATCH:
            arguments: list[str | int] = [priority, tenant, last, _BATCH]
            cancelled, looked_at, foreign = _PURGE(self._server, self._keys.tag, arguments)
            total += Purged(cancelled=cancelled, foreign=foreign)
        return total

    def dead(self) -> Iterator[DeadLetter]:
        """Dead letters, the latest first."""
        before = "+"
        while True:
            rows: Any = self._server.xrevrange(self._keys.dead, before, count=_BATCH)
            for entry_id, fields in rows:
                yield DeadLetter(
                    request_id=fields[b"id"].decode(),
                    tenant=fields.get(b"tenant", b"").decode(),
                    attempts=int(fields.get(b"attempts", 0)),
                    reason=fields[b"reason"].decode(),
                    died_ms=int(entry_id.partition(b"-")[0]),
                )
            if len(rows) < _BATCH:
                return
            before = f"({rows[-1][0].decode()}"

    def retry(self, request_ids: Iterable[str]) -> dict[str, str]:
        """Run dead letters again from their first token; per id OK, or why not.

        A queue or a quota that is full takes no more of them: they stay dead letters.
        """
        verdicts: dict[str, str] = {}
        for some in _batches(request_ids):
            arguments: list[str | int] = [_REVIVED_S * 1000, *some]
            replies = _REVIVE(self._server, self._keys.tag, arguments)
            verdicts.update(zip(some, (_TOLD[reply.decode()] for reply in replies), strict=True))
        return verdicts

    def drop(self, request_ids: Iterable[str]) -> int:
        """Forget dead letters; returns how many there were."""
        return sum(int(_BURY(self._server, self._keys.tag, some)) for some in _batches(request_ids))

    def compact(self, request_ids: Iterable[str]) -> int:
        """Join the deltas of ended requests that were read, to save memory; returns how many."""
        return sum(
            int(_COMPACT(self._server, self._keys.tag, some))
            for some in _batches(request_ids, _COMPACTED)
        )

    def _oldest_s(self, now_ms: int) -> float:
        oldest = now_ms
        for priority in PRIORITIES:
            names: Any = self._server.zrange(self._keys.lanes(priority), 0, _LANES - 1)
            for name in names:
                oldest = min(oldest, self._oldest_ms(self._keys.lane(priority, name.decode())))
        return max(now_ms - oldest, 0) / 1000

    def _oldest_ms(self, lane: str) -> int:
        """When the next reference of a lane was enqueued."""
        if not self._server.exists(lane):
            return 2**63
        groups: Any = self._server.xinfo_groups(lane)
        after = groups[0]["last-delivered-id"].decode() if groups else "0-0"
        ahead: Any = self._server.xrange(lane, f"({after}", count=1)
        return int(ahead[0][0].partition(b"-")[0]) if ahead else 2**63


#: What `retry` says of what stays a dead letter for want of room.
FULL = "the queue is full (max_live)"
OVER_QUOTA = "the quota of its tenant is full"
#: What `retry` says of a verdict.
_TOLD = {
    "BUSY": FULL,
    "QUOTA": OVER_QUOTA,
    "OK": "OK",
    "NONE": "no dead letter of that id",
    "GONE": "its payload is not kept any more",
}


def _within(name: str, value: float, low: float, high: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise InvalidRequest(name, f"from {low:g} to {high:g}", value)
    return value


def _text_map(fields: Any) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}


def _batches(ids: Iterable[str], most: int = _BATCH) -> Iterator[Sequence[str]]:
    waiting = iter(tuple(ids))
    while batch := tuple(islice(waiting, most)):
        yield batch
