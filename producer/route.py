"""`Route`: where to connect when the primary may move: Sentinels and clusters know.

A routed connection asks its route for the address each time that it connects. When the server says
that it is no longer the one, the connection is closed and a connection error raised: whoever
retries comes to the new primary, with the same command. So everything above uses plain connections
and knows of no topology. A primary that was cut off from its Sentinels does not say so: they are
asked now and then.

An ASK is not followed, as the libraries for clusters do: while a slot moves key by key, a script
would run on the other node and find half of its keys missing. Such a shard is away until the move
has ended, as it is during a failover.
"""

import random
import threading
import time
from collections.abc import Iterable
from typing import Any, Protocol

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from tokenmill.producer.address import Address

#: Of one question to a Sentinel or node; then the next one is asked.
_TIMEOUT_S = 2.0
#: How often a connection that is in use asks the Sentinels whether it still is the right one.
CHECK_S = 5.0
SLOTS = 16384

HostPort = tuple[str, int]

#: Answers of a server that is not the one, or not now.
_ELSEWHERE = (AskError, ClusterDownError, MasterDownError, ReadOnlyError, TryAgainError)
_ELSEWHERE_CODES = ("ASK", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN")


class Misdirected(RedisConnectionError):
    """What answers is no Sentinel, no node of a cluster, or refuses us."""


class Route(Protocol):
    """Finds the primary. Threads share it."""

    def find(self) -> HostPort:
        """Where the primary is.

        Raises:
            Misdirected, or another ConnectionError: nobody can tell.
        """

    def lost(self, to: HostPort | None = None) -> None:
        """The primary is no longer where it was; `to` is where it was said to be."""

    def has_left(self, address: HostPort) -> bool:
        """Whether the primary is known to be elsewhere, though that server does not say so."""


class SentinelRoute:
    """The primary that Sentinels name."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._members = list(address.members)

    def find(self) -> HostPort:
        last: RedisError | None = None
        for member in list(self._members):
            try:
                found = self._ask(member)
            except RedisError as error:
                last = last if isinstance(last, Misdirected) else error
                continue
            # Who answered is asked first next time: others may be slow to fail.
            self._members.sort(key=lambda other, first=member: other != first)  # type: ignore[misc]
            return found
        if isinstance(last, Misdirected):
            raise last
        raise RedisConnectionError(f"no Sentinel answers: {last}")

    def lost(self, to: HostPort | None = None) -> None:
        """Nothing is kept: each connection asks."""

    def has_left(self, address: HostPort) -> bool:
        try:
            return self.find() != address
        except RedisError:  # nobody knows better
            return False

    def _ask(self, member: HostPort) -> HostPort:
        where = f"{member[0]}:{member[1]}"
        with _opened(self._address, member, self._address.sentinel) as sentinel:
            call: Any = sentinel.execute_command
            service = self._address.service
            try:
                found = call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
            except (AuthenticationError, NoPermissionError) as error:
                remedy = "give ?sentinel_username= and sentinel_password= their rights"
                raise Misdirected(f"the Sentinel {where} refuses us: {error}; {remedy}") from error
            except ResponseError as error:
                remedy = "a server is redis://, a cluster redis+cluster://"
                raise Misdirected(f"{where} is no Sentinel: {error}; {remedy}") from error
            if found is None:
                known = ", ".join(sorted(_names(call("SENTINEL", "MASTERS")))) or "none"
                text = f"the Sentinel {where} knows no service {service!r}; it knows: {known}"
                raise Misdirected(text)
            return _text(found[0]), int(found[1])


class ClusterMap:
    """Which node of a cluster has which slot: asked for when it is first needed, and when wrong."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._primaries: dict[range, HostPort] = {}
        self._moved: dict[int, HostPort] = {}
        self._nodes = list(address.members)  # replicas too

    def primary_of(self, slot: int) -> HostPort:
        """The node that has a slot.

        Raises:
            Misdirected, or another ConnectionError: nobody can tell.
        """
        with self._lock:
            if slot in self._moved:
                return self._moved[slot]
            if not self._primaries:
                self._ask_all()
            for slots, node in self._primaries.items():
                if slot in slots:
                    return node
            self._primaries = {}
        raise RedisConnectionError(f"no node of the cluster has slot {slot}")

    def forget(self, slot: int, to: HostPort | None) -> None:
        """The map is wrong about a slot; `to` is where a node said that it is."""
        with self._lock:
            self._moved.pop(slot, None)
            self._primaries = {}
            if to:
                self._moved[slot] = to

    def _ask_all(self) -> None:
        last: RedisError | None = None
        # In any order: one whose view is old is not asked each time.
        for node in random.sample(self._nodes, len(self._nodes)):
            try:
                rows = self._ask(node)
            except RedisError as error:
                last = last if isinstance(last, Misdirected) else error
                continue
            self._primaries = {slots: nodes[0] for slots, nodes in rows}
            self._moved = {}
            self._nodes = list({*self._address.members, *(n for _, nodes in rows for n in nodes)})
            return
        if isinstance(last, Misdirected):
            raise last
        raise RedisConnectionError(f"no node of the cluster answers: {last}")

    def _ask(self, node: HostPort) -> list[tuple[range, list[HostPort]]]:
        """Ranges of slots, each with its nodes, the primary first."""
        where = f"{node[0]}:{node[1]}"
        with _opened(self._address, node, self._address.options) as server:
            call: Any = server.execute_command
            try:
                rows = call("CLUSTER", "SLOTS")
            except (AuthenticationError, NoPermissionError):
                raise
            except ResponseError as error:
                remedy = "a server is redis://, a Sentinel redis+sentinel://"
                raise Misdirected(f"{where} is no node of a cluster: {error}; {remedy}") from error
        return [
            (range(row[0], row[1] + 1), [_endpoint(item, node) for item in row[2:]]) for row in rows
        ]


class SlotRoute:
    """The node that has one slot of a cluster."""

    def __init__(self, cluster: ClusterMap, slot: int) -> None:
        self._cluster = cluster
        self._slot = slot

    def find(self) -> HostPort:
        return self._cluster.primary_of(self._slot)

    def lost(self, to: HostPort | None = None) -> None:
        self._cluster.forget(self._slot, to)

    def has_left(self, address: HostPort) -> bool:  # noqa: ARG002
        """A node that is cut off from its cluster says so itself."""
        return False


class _Routed:
    """Of a connection: find the primary anew each time it connects."""

    def __init__(self, *, route: Route, **options: Any) -> None:
        self._route = route
        self._check_at = time.monotonic() + CHECK_S
        super().__init__(**options)

    def _connect(self) -> Any:
        # The two attributes and this method are the library's own.
        self.host, self.port = self._route.find()
        self._check_at = time.monotonic() + CHECK_S
        try:
            return super()._connect()  # type: ignore[misc]
        except (OSError, RedisError):
            self._route.lost()
            raise

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            reply = super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            away = misled(self._route, (self.host, self.port), error)
            if away or is_cut_off(error):
                self.disconnect()  # type: ignore[attr-defined]
            if away:
                raise away from error
            raise
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + CHECK_S
            if self._route.has_left((self.host, self.port)):
                self.disconnect()  # type: ignore[attr-defined]
        return reply


def misled(route: Route, here: HostPort, error: ResponseError) -> RedisConnectionError | None:
    """What to raise where a server says that it is not the one, of which the route is told."""
    code, _, rest = str(error).partition(" ")  # older versions of the library have no class for it
    to: HostPort | None = None
    if isinstance(error, MovedError):
        to = error.host or here[0], error.port
    elif code == "MOVED":
        host, _, port = rest.rpartition(" ")[2].rpartition(":")
        to = host or here[0], int(port)
    elif not isinstance(error, _ELSEWHERE) and code not in _ELSEWHERE_CODES:
        return None
    route.lost(to)
    return RedisConnectionError(f"{here[0]}:{here[1]} is not the primary now: {error}")


def is_cut_off(error: ResponseError) -> bool:
    """Whether the server may be cut off from the others."""
    return str(error).startswith("NOREPLICAS ")


class RoutedConnection(_Routed, Connection):
    """A connection to wherever its route leads."""


class RoutedSSLConnection(_Routed, SSLConnection):
    """The same over TLS."""


def key_slot(key: str) -> int:
    """The slot of a key on a cluster: CRC16 of its tag, or of all of it."""
    start = key.find("{")
    stop = key.find("}", start + 1)
    tag = key[start + 1 : stop] if start >= 0 and stop > start + 1 else key
    crc = 0
    for byte in tag.encode():
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc % SLOTS


def _opened(address: Address, member: HostPort, credentials: dict[str, Any]) -> redis.Redis:
    options = {k: v for k, v in address.options.items() if k not in ("username", "password", "db")}
    options |= {k: credentials[k] for k in ("username", "password") if credentials.get(k)}
    pool = redis.ConnectionPool(
        host=member[0],
        port=member[1],
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        **options,
    )
    return redis.Redis.from_pool(pool)


def _endpoint(row: list[Any], asked: HostPort) -> HostPort:
    """Host and port of a node; where it names no host it is the one that was asked."""
    host = _text(row[0]) if row[0] else ""
    return (asked[0] if host in ("", "?") else host), int(row[1])


def _names(masters: Any) -> Iterable[str]:
    if isinstance(masters, dict):
        return [_text(name) for name in masters]
    rows = [dict(zip(row[::2], row[1::2], strict=False)) for row in masters]
    return [_text(row[b"name"]) for row in rows]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
