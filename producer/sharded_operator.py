"""`ShardedOperator`: the operator's side of a queue of several shards, like that of one.

Limits on a number of requests are shared out evenly, rounded up; all else holds in each shard.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from tokenmill.producer.operator import DeadLetter, Operator, Purged, QueueStatus
from tokenmill.producer.shards import Shards

_SUMS = ("live", "waiting", "running", "parked", "inbox", "dead")


class OperatorLike(Protocol):
    """The operator's side of a queue, of one shard or several: see `Operator`."""

    def status(self) -> QueueStatus: ...
    def configure(
        self,
        *,
        max_live: int | None = None,
        result_ttl_s: float | None = None,
        dead_ttl_s: float | None = None,
        weights: Mapping[str, float] | None = None,
        quotas: Mapping[str, int] | None = None,
    ) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def purge(self, *, tenant: str = "", priority: int | None = None) -> Purged: ...
    def dead(self) -> Iterator[DeadLetter]: ...
    def retry(self, request_ids: Iterable[str]) -> dict[str, str]: ...
    def drop(self, request_ids: Iterable[str]) -> int: ...
    def compact(self, request_ids: Iterable[str]) -> int: ...


def operator_of(shards: Shards) -> OperatorLike:
    """The operator's side of these shards."""
    parts = [Operator(server, keys) for keys, server in shards]
    return parts[0] if len(parts) == 1 else ShardedOperator(shards, parts)


class ShardedOperator:
    """The operator's side of several shards."""

    def __init__(self, shards: Shards, parts: list[Operator]) -> None:
        self._shards = shards
        self._parts = parts

    def status(self) -> QueueStatus:
        found = [part.status() for part in self._parts]
        sums = {name: sum(getattr(status, name) for status in found) for name in _SUMS}
        tenants: Counter[str] = Counter()
        for status in found:
            tenants.update(status.tenants)
        return replace(
            found[0],
            **sums,
            paused=any(status.paused for status in found),
            workers=max(status.workers for status in found),
            oldest_s=max(status.oldest_s for status in found),
            tenants=dict(tenants),
            settings=self._settings(found),
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
        for part in self._parts:
            part.configure(
                max_live=None if max_live is None else self._share(max_live),
                result_ttl_s=result_ttl_s,
                dead_ttl_s=dead_ttl_s,
                weights=weights,
                quotas={tenant: self._share(quota) for tenant, quota in (quotas or {}).items()},
            )

    def pause(self) -> None:
        for part in self._parts:
            part.pause()

    def resume(self) -> None:
        for part in self._parts:
            part.resume()

    def purge(self, *, tenant: str = "", priority: int | None = None) -> Purged:
        parts = (part.purge(tenant=tenant, priority=priority) for part in self._parts)
        return sum(parts, start=Purged())

    def dead(self) -> Iterator[DeadLetter]:
        letters = (part.dead() for part in self._parts)
        return heapq.merge(*letters, key=lambda letter: letter.died_ms, reverse=True)

    def retry(self, request_ids: Iterable[str]) -> dict[str, str]:
        ids = tuple(request_ids)
        told: dict[str, str] = {}
        for part, some in self._split(ids):
            told |= part.retry(some)
        return {request_id: told[request_id] for request_id in ids}

    def drop(self, request_ids: Iterable[str]) -> int:
        return sum(part.drop(some) for part, some in self._split(request_ids))

    def compact(self, request_ids: Iterable[str]) -> int:
        return sum(part.compact(some) for part, some in self._split(request_ids))

    def _split(self, request_ids: Iterable[str]) -> Iterator[tuple[Operator, list[str]]]:
        for number, some in self._shards.split((item, item) for item in request_ids).items():
            yield self._parts[number], some

    def _share(self, limit: int) -> Any:
        """One shard's part of a limit; what is no whole number is refused by the shard."""
        return -(-limit // self._shards.count) if type(limit) is int else limit

    def _settings(self, found: list[QueueStatus]) -> dict[str, str]:
        """What was set, with the limits that are shared out put together again."""
        settings = dict(found[0].settings)
        for name in settings:
            if name == "max_live" or name.startswith("quota:"):
                settings[name] = str(sum(int(s.settings.get(name, 0)) for s in found))
        return settings
