"""`Shards`: the parts of a queue, where each of them is, and how many there are.

One on a single server or behind Sentinels, unless told otherwise. On a cluster a part of the queue
lives on each node, so there are several; every request says by its id in which it is. Their number
is written to the first shard by whoever uses the queue first, and never changes: ids would lead
elsewhere. Without a number there is one.
"""

import os
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import redis
from redis.exceptions import NoPermissionError, RedisError

from tokenmill.producer.connection import Connector
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable, WrongServer
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import check_request_id
from tokenmill.producer.shard_reader import ShardReader

SHARDS = "TOKENMILL_SHARDS"
#: On a cluster: two or more for each of three to four primaries, and no more connections than a
#: reader or a worker can have, which is one for each.
CLUSTER_SHARDS = 8
MAX_SHARDS = 256

_Item = TypeVar("_Item")


class ReadsStreams(Protocol):
    """Of a client, what reads streams; the entries in the client library's form."""

    def xread(
        self, streams: dict[Any, Any], count: int | None = None, block: int | None = None
    ) -> Any: ...


class Layout:
    """How a queue is spread over its shards: no connection is needed to know it."""

    def __init__(self, queue: str, count: int) -> None:
        self.queue = queue
        self.count = count
        self.keys = tuple(Keys(queue, number) for number in range(count))

    def number_of(self, request_id: str) -> int:
        """The shard of a request.

        Raises:
            InvalidRequest: the id has another form, or the queue has no such shard.
        """
        number = int(check_request_id(request_id).partition(".")[0])
        if number >= self.count:
            expected = f"an id of shard 0 to {self.count - 1} of queue {self.queue}"
            raise InvalidRequest("request_id", expected, request_id, "make it with Client.id_for")
        return number

    def number_for(self, key: str) -> int:
        """The shard of an idempotency key."""
        return zlib.crc32(key.encode()) % self.count

    def any_number(self) -> int:
        """A shard for a new request."""
        return random.randrange(self.count) if self.count > 1 else 0

    def keys_of(self, request_id: str) -> Keys:
        """The keys of the shard of a request."""
        return self.keys[self.number_of(request_id)]

    def split(self, items: Iterable[tuple[str, _Item]]) -> dict[int, list[_Item]]:
        """Items with their request ids, by shard."""
        parts: dict[int, list[_Item]] = {}
        for request_id, item in items:
            parts.setdefault(self.number_of(request_id), []).append(item)
        return parts


class Shards(Layout):
    """The shards of a queue and connections to them; threads may share it."""

    def __init__(self, url: str, queue: str, *, count: int | None = None) -> None:
        """Find out how many there are; `count` or `TOKENMILL_SHARDS` says it for a new queue.

        Raises:
            InvalidRequest: the queue has another number, or the URL another form.
            ServerUnreachable, WrongServer: as for `connect`.
        """
        self._connector = Connector(url)
        first = self._connector.connect(key=Keys(queue).tag)
        try:
            found = _agreed(
                first, Keys(queue), _wanted(count), CLUSTER_SHARDS if self.is_cluster else 1
            )
        except BaseException:
            first.close()
            raise
        super().__init__(queue, found)
        self._servers = self._open(first)
        self._blocking = self._open(self._connector.connect(key=Keys(queue).tag, blocking=True))

    @property
    def is_cluster(self) -> bool:
        return self._connector.is_cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for server in {*self._servers, *self._blocking}:
            server.close()

    def server_of(self, request_id: str) -> redis.Redis:
        """A connection to the shard of a request."""
        return self._servers[self.number_of(request_id)]

    def __iter__(self) -> Iterator[tuple[Keys, redis.Redis]]:
        """The keys of each shard, and a connection to it."""
        return iter(zip(self.keys, self._servers, strict=True))

    def server(self, number: int) -> redis.Redis:
        """A connection for scripts."""
        return self._servers[number]

    def blocking(self, number: int) -> redis.Redis:
        """A connection for reads that wait."""
        return self._blocking[number]

    def reader(self) -> "ReadsStreams":
        """What reads streams of all shards, for one thread."""
        if self.count == 1:
            return self._blocking[0]
        return ShardReader(self._blocking, shard_of)

    def _open(self, first: redis.Redis) -> Sequence[redis.Redis]:
        if not self.is_cluster:
            return (first,) * self.count
        is_blocking = hasattr(self, "_servers")
        return (
            first,
            *(
                self._connector.connect(key=keys.tag, blocking=is_blocking, checks=False)
                for keys in self.keys[1:]
            ),
        )


def shard_of(key: str) -> int:
    """The shard of a key of any queue."""
    return int(key[key.index(":") + 1 : key.index("}")])


def _wanted(count: int | None) -> int | None:
    text = os.environ.get(SHARDS) if count is None else str(count)
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MAX_SHARDS:
        raise InvalidRequest(SHARDS, f"a number from 1 to {MAX_SHARDS}", text)
    return int(text)


def _agreed(server: redis.Redis, keys: Keys, wanted: int | None, default: int) -> int:
    try:
        found = server.get(keys.shards)
        if found is None and (wanted or default) > 1:
            server.set(keys.shards, wanted or default, nx=True)
            found = server.get(keys.shards)
    except NoPermissionError as error:
        remedy = "give this user the rights of a producer, worker or operator"
        raise WrongServer(f"the server refuses us: {error}; {remedy}") from error
    except RedisError as error:
        raise ServerUnreachable(f"queue {keys.queue} cannot be opened: {error}") from error
    count = int(found) if found else wanted or default
    if wanted and wanted != count:
        expected = f"{count}, as queue {keys.queue} has"
        raise InvalidRequest("shards", expected, wanted, f"leave out {SHARDS}, or use a new queue")
    return count
