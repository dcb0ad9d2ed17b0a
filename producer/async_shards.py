"""`AsyncShards`: connections of asyncio to the shards of a queue; `AsyncTransport` over them."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from redis import asyncio as aio
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.connection import SSLConnection as BlockingSSLConnection
from redis.connection import UnixDomainSocketConnection as BlockingSocketConnection
from redis.exceptions import RedisError, ResponseError

from tokenmill.producer.connection import Connector, retries, timeout_of
from tokenmill.producer.route import CHECK_S, Route, is_cut_off, misled
from tokenmill.producer.shards import Layout, Shards, shard_of
from tokenmill.producer.steps import Call, Calls, Effect, Sleep

#: As the client library gives them: stream, and entry ids with their fields.
Rows = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]


class AsyncShards(Layout):
    """The shards of a queue; the tasks of one event loop may share it."""

    def __init__(self, connector: Connector, queue: str, count: int) -> None:
        super().__init__(queue, count)
        self.is_cluster = connector.is_cluster
        some = self.keys if self.is_cluster else self.keys[:1]
        self._servers = [_open(connector, keys.tag, blocking=False) for keys in some]
        self._blocking = [_open(connector, keys.tag, blocking=True) for keys in some]

    @classmethod
    async def open(cls, url: str, queue: str) -> Self:
        """Find out what is there, as `Shards` does, with its errors."""
        shards = await asyncio.to_thread(Shards, url, queue)
        count = shards.count
        await asyncio.to_thread(shards.close)
        return cls(Connector(url), queue, count)

    async def aclose(self) -> None:
        """Close the connections."""
        for server in (*self._servers, *self._blocking):
            await server.aclose()

    def server(self, number: int) -> aio.Redis:
        """Connections for scripts."""
        return self._servers[number if self.is_cluster else 0]

    def blocking(self, number: int) -> aio.Redis:
        """Connections for reads that wait."""
        return self._blocking[number if self.is_cluster else 0]


class AsyncTransport:
    """Does what `steps` ask for; one task at a time. Close it, or reads may stay sent."""

    def __init__(self, shards: AsyncShards) -> None:
        self._shards = shards
        #: On a cluster, of each shard: the read that was sent.
        self._reads: dict[int, _Read] = {}

    async def aclose(self) -> None:
        """Give up what was sent."""
        for number in list(self._reads):
            await self._give_up(number)

    async def __call__(self, effect: Effect) -> Any:
        if isinstance(effect, Call):
            server = self._shards.server(effect.shard)
            return await getattr(server, effect.method)(*effect.arguments)
        if isinstance(effect, Calls):
            async with self._shards.server(effect.shard).pipeline(transaction=False) as pipeline:
                for method, arguments in effect.calls:
                    getattr(pipeline, method)(*arguments)
                return await pipeline.execute()
        if isinstance(effect, Sleep):
            return await asyncio.sleep(effect.seconds)
        return await self._xread(effect.streams, effect.count, effect.block_ms)

    async def _xread(self, streams: Mapping[Any, Any], count: int, block_ms: int) -> Rows:
        wanted: dict[int, dict[Any, Any]] = {}
        for key, entry_id in streams.items():
            shard = shard_of(key) if self._shards.is_cluster else 0
            wanted.setdefault(shard, {})[key] = entry_id
        # The answer to a read of what nobody follows any more would have no taker.
        for shard in list(self._reads):
            if len(wanted) == 1 or shard not in wanted:
                await self._give_up(shard)
        if len(wanted) == 1:
            ((shard, only),) = wanted.items()
            rows: Any = await self._shards.blocking(shard).xread(only, count, block_ms)
            return rows or []
        for shard, some in wanted.items():
            await self._send(shard, some, count, block_ms)
        tasks = [self._reads[shard].task for shard in wanted]
        await asyncio.wait(tasks, timeout=block_ms / 1000, return_when=asyncio.FIRST_COMPLETED)
        return self._answered()

    async def _send(self, shard: int, streams: dict[Any, Any], count: int, block_ms: int) -> None:
        """A read of a shard, unless just that was sent and is not answered yet."""
        if shard in self._reads and self._reads[shard].streams != streams:
            await self._give_up(shard)
        if shard not in self._reads:
            read = self._shards.blocking(shard).xread(streams, count, block_ms)
            self._reads[shard] = _Read(dict(streams), asyncio.ensure_future(read))

    def _answered(self) -> Rows:
        """What has come. An error of one shard is raised when the others had nothing."""
        rows: Rows = []
        lost: RedisError | None = None
        for shard, read in list(self._reads.items()):
            if not read.task.done():
                continue
            del self._reads[shard]
            try:
                rows += read.task.result() or []
            except RedisError as error:
                lost = error
        if lost and not rows:
            raise lost
        return rows

    async def _give_up(self, shard: int) -> None:
        """The library closes the connection of a read that is cancelled."""
        task = self._reads.pop(shard).task
        task.cancel()
        with suppress(asyncio.CancelledError, RedisError):
            await task


@dataclass(frozen=True, slots=True)
class _Read:
    streams: dict[Any, Any]
    task: "asyncio.Future[Any]"


class _Routed:
    """Of a connection: find the primary anew each time it connects."""

    def __init__(self, *, route: Route, **options: Any) -> None:
        self._route = route
        self._check_at = time.monotonic() + CHECK_S
        super().__init__(**options)

    async def _connect(self) -> Any:
        # The two attributes and this method are the library's own; a route asks by blocking.
        self.host, self.port = await asyncio.to_thread(self._route.find)
        self._check_at = time.monotonic() + CHECK_S
        try:
            return await super()._connect()  # type: ignore[misc]
        except (OSError, RedisError):
            self._route.lost()
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            reply = await super().read_response(*args, **options)  # type: ignore[misc]
        except ResponseError as error:
            away = misled(self._route, (self.host, self.port), error)
            if away or is_cut_off(error):
                await self.disconnect()  # type: ignore[attr-defined]
            if away:
                raise away from error
            raise
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + CHECK_S
            if await asyncio.to_thread(self._route.has_left, (self.host, self.port)):
                await self.disconnect()  # type: ignore[attr-defined]
        return reply


class _RoutedConnection(_Routed, Connection):
    pass


class _RoutedSSLConnection(_Routed, SSLConnection):
    pass


def _open(connector: Connector, key: str, *, blocking: bool) -> aio.Redis:
    options = connector.options(key, timeout_of(blocking=blocking))
    classes: dict[Any, Any] = {
        BlockingSSLConnection: SSLConnection,
        BlockingSocketConnection: UnixDomainSocketConnection,
    }
    kind = classes.get(options.pop("connection_class", None), Connection)
    if "route" in options:
        kind = _RoutedSSLConnection if connector.address.is_tls else _RoutedConnection
    retry = Retry(*retries(blocking=blocking))
    pool: Any = aio.ConnectionPool(connection_class=kind, retry=retry, **options)
    return aio.Redis.from_pool(pool)
