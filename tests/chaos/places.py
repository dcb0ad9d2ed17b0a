"""Where the server of a run is: `Alone` behind a proxy, or in a `Group` whose replicas take over.

Of a group connections are cut by the server itself; a restart is the death of a primary, whose
replica takes its place, and the return of the dead as a replica.
"""

import random
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol, Self

import redis
from redis.exceptions import RedisError

from proxy import Proxy
from server import ChaosServer
from servers import Cluster, Replicated, Server, cluster, replicated
from tokenmill.producer.connection import connect
from tokenmill.producer.keys import Keys

#: How long a dead primary stays away at least: its replica has taken over by then, or soon will.
AWAY_S = 4.0


class Place(Protocol):
    """What a run needs of its servers; use it in a `with`."""

    @property
    def url(self) -> str: ...
    def connect(self, keys: Keys) -> redis.Redis: ...
    def restart(self, rng: random.Random, *, is_lossy: bool) -> bool: ...
    def settle(self) -> bool: ...
    def hurt(self, rng: random.Random, fault: str, delay_s: float = 0.0) -> bool: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _Stacked:
    def __init__(self) -> None:
        self._stack = ExitStack()

    def __exit__(self, *_error: object) -> None:
        self._stack.close()


class Alone(_Stacked):
    """One server, which is killed and comes back; connections go through a proxy."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._server = ChaosServer(kind)
        self._proxy = Proxy(self._server.socket)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._server)
        self._stack.enter_context(self._proxy)
        return self

    @property
    def url(self) -> str:
        return self._proxy.url

    def connect(self, keys: Keys) -> redis.Redis:
        return self._server.connect()

    def restart(self, rng: random.Random, *, is_lossy: bool) -> bool:
        if is_lossy:
            self._server.lose(rng.choice([0.05, 0.3, 1.0, 2.0]))
        else:
            self._server.kill()
        time.sleep(rng.choice([0.0, 0.1, 0.5, 1.5]))
        self._server.start()
        return True

    def settle(self) -> bool:
        return True

    def hurt(self, rng: random.Random, fault: str, delay_s: float = 0.0) -> bool:
        return self._proxy.hurt(rng, fault, delay_s)


class Group(_Stacked):
    """A primary behind Sentinels, or a cluster of three with a replica each."""

    def __init__(self, kind: str, place: str, tags: list[str]) -> None:
        """`place` is sentinel or cluster; `tags` are of the shards, whose primaries are killed."""
        super().__init__()
        self._kind, self._place, self._tags = kind, place, tags
        self._dead: tuple[Server, float] | None = None

    def __enter__(self) -> Self:
        self._servers: Cluster | Replicated
        if self._place == "cluster":
            self._servers = self._stack.enter_context(cluster(self._kind, replicas=1))
        else:
            self._servers = self._stack.enter_context(replicated(self._kind))
        return self

    @property
    def url(self) -> str:
        return self._servers.url

    def connect(self, keys: Keys) -> redis.Redis:
        return connect(self.url, key=keys.tag)

    def restart(self, rng: random.Random, *, is_lossy: bool) -> bool:
        """Kill a primary that has a replica; False: it is not the time for that."""
        if not self.settle():
            return False
        primary = self._primary(rng.choice(self._tags))
        if primary is None or not self._has_replica(primary):
            return False
        primary.kill()
        self._dead = primary, time.monotonic()
        return True

    def settle(self) -> bool:
        """Bring back who is dead, once another is in its place; False: not yet."""
        if self._dead is None:
            return True
        server, since = self._dead
        if time.monotonic() - since < AWAY_S:
            return False
        primaries = [self._primary(tag) for tag in self._tags]
        if None in primaries or server in primaries:
            return False
        server.start()
        self._dead = None
        return True

    def hurt(self, rng: random.Random, fault: str, delay_s: float = 0.0) -> bool:
        """Cut the connections of clients to one primary, whatever the fault."""
        primary = self._primary(rng.choice(self._tags))
        if primary is None:
            return False
        try:
            with primary.admin() as client:
                client.client_kill_filter(_type="normal", skipme=True)
        except (RedisError, OSError):
            return False
        return True

    def _primary(self, tag: str) -> Server | None:
        """Who serves a shard, as the others see it; None: nobody can say."""
        try:
            if isinstance(self._servers, Cluster):
                found = self._servers.primary_of(tag)
            else:
                found = self._servers.primary()
        except (RedisError, OSError, StopIteration):
            return None
        return found

    def _has_replica(self, server: Server) -> bool:
        try:
            with server.admin() as client:
                info = client.info("replication")
        except (RedisError, OSError):
            return False
        replicas = [info.get(f"slave{number}") for number in range(5)]
        return any(isinstance(r, dict) and r.get("state") == "online" for r in replicas)
