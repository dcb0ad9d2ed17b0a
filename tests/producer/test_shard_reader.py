"""One thread that reads several shards: on one server, and over the nodes of a cluster."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from servers import Server
from tokenmill.producer.connection import Connector
from tokenmill.producer.keys import Keys
from tokenmill.producer.shard_reader import SLICE_MS, ShardReader
from tokenmill.producer.shards import Shards, shard_of

COUNT = 4
QUEUE = "many"
STREAMS = [Keys(QUEUE, number).output("x") for number in range(COUNT)]
MakeReader = Callable[[str], ShardReader]

pytestmark = pytest.mark.everywhere


@pytest.fixture
def make_reader() -> Iterator[MakeReader]:
    readers: list[tuple[ShardReader, list[redis.Redis]]] = []

    def make(url: str) -> ShardReader:
        connector = Connector(url)
        servers = [connector.connect(key=key, blocking=True) for key in STREAMS]
        readers.append((ShardReader(servers, shard_of), servers))
        return readers[-1][0]

    yield make
    for reader, servers in readers:
        reader.close()
        for server in servers:
            server.close()


@pytest.fixture
def add(server_url: str) -> Iterator[Callable[..., None]]:
    """`add(shard, id, ...)`: entries to the stream of a shard."""
    with Shards(server_url, QUEUE, count=COUNT) as shards:

        def entries(number: int, *ids: str) -> None:
            for entry_id in ids:
                shards.server(number).xadd(STREAMS[number], {"f": f"{number}"}, id=entry_id)

        yield entries


def names(rows: Any) -> list[tuple[str, list[str]]]:
    return sorted((key.decode(), [i.decode() for i, _ in entries]) for key, entries in rows)


def test_gives_what_is_there_at_once(
    server_url: str, make_reader: MakeReader, add: Callable[..., None]
) -> None:
    add(0, "1-0", "2-0")
    add(3, "5-0")
    reader = make_reader(server_url)
    streams = dict.fromkeys(STREAMS, "0-0")
    rows = reader.xread(streams, count=10, block=1)
    assert names(rows) == [(STREAMS[0], ["1-0", "2-0"]), (STREAMS[3], ["5-0"])]
    assert rows[0][1][0][1] == {b"f": b"0"}
    began = time.monotonic()
    assert reader.xread(dict.fromkeys(STREAMS, "9-0"), count=10, block=1) == []
    assert time.monotonic() - began < 0.5
    assert names(reader.xread({STREAMS[0]: "1-0"}, count=10, block=1)) == [(STREAMS[0], ["2-0"])]


def test_waits_for_the_first_and_gives_the_others_later(
    server_url: str, make_reader: MakeReader, add: Callable[..., None]
) -> None:
    reader = make_reader(server_url)
    cursors = dict.fromkeys(STREAMS, "0-0")
    began = time.monotonic()
    assert reader.xread(cursors, count=10, block=100) == []
    assert 0.09 < time.monotonic() - began < 0.5
    timer = threading.Timer(0.05, add, (2, "1-0"))
    timer.start()
    assert names(reader.xread(cursors, count=10, block=5000)) == [(STREAMS[2], ["1-0"])]
    timer.join()
    cursors[STREAMS[2]] = "1-0"
    add(0, "1-0")
    add(2, "2-0")
    seen: list[str] = []
    while len(seen) < 2:
        rows = reader.xread(cursors, count=10, block=5000)
        for key, entries in rows:
            cursors[key.decode()] = entries[-1][0].decode()
            seen.append(key.decode())
    assert sorted(seen) == [STREAMS[0], STREAMS[2]]
    assert reader.xread(cursors, count=10, block=20) == []


def test_an_added_stream_does_not_wait_for_the_others(
    server_url: str, make_reader: MakeReader, add: Callable[..., None]
) -> None:
    reader = make_reader(server_url)
    late = Keys(QUEUE).output("late")
    silent = {STREAMS[0]: "0-0", STREAMS[1]: "0-0"}
    with Shards(server_url, QUEUE, count=COUNT) as shards:
        assert reader.xread(silent, count=10, block=20) == []
        for number in range(3):
            shards.server(0).xadd(late, {"f": "1"}, id=f"{number + 1}-0")
            began = time.monotonic()
            rows = reader.xread({**silent, late: f"{number}-0"}, count=10, block=5000)
            assert names(rows) == [(late, [f"{number + 1}-0"])]
            assert time.monotonic() - began < 10 * SLICE_MS / 1000
            assert reader.xread(silent, count=10, block=20) == []


def test_a_stream_that_was_left_or_moved_is_not_answered_for(
    server_url: str, make_reader: MakeReader, add: Callable[..., None]
) -> None:
    reader = make_reader(server_url)
    other = Keys(QUEUE).output("other")
    both = {STREAMS[0]: "0-0", other: "0-0"}
    assert reader.xread(both, count=10, block=20) == []
    add(0, "1-0")
    assert reader.xread({other: "0-0"}, count=10, block=20) == []
    add(0, "2-0")
    rows = reader.xread({STREAMS[0]: "1-0", other: "0-0"}, count=10, block=1000)
    assert names(rows) == [(STREAMS[0], ["2-0"])]


def test_an_answer_that_is_an_error_is_raised(
    server_url: str, make_reader: MakeReader, add: Callable[..., None]
) -> None:
    reader = make_reader(server_url)
    with Shards(server_url, QUEUE, count=COUNT) as shards:
        shards.server(1).set(STREAMS[1], "no stream")
        with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
            reader.xread(dict.fromkeys(STREAMS, "0-0"), count=10, block=1000)
        shards.server(1).delete(STREAMS[1])
    add(1, "1-0")
    rows = reader.xread(dict.fromkeys(STREAMS, "0-0"), count=10, block=1000)
    assert names(rows) == [(STREAMS[1], ["1-0"])]


def test_a_shard_that_is_away_does_not_hold_up_the_others(
    own_server: Server, server_url: str, make_reader: MakeReader, add: Callable[..., None]
) -> None:
    other = redis.Redis.from_url(own_server.url, protocol=2)
    connector = Connector(server_url)
    servers = [connector.connect(key=key, blocking=True) for key in STREAMS[:3]] + [other]
    reader = ShardReader(servers, shard_of)
    cursors = dict.fromkeys(STREAMS, "0-0")
    assert reader.xread(cursors, count=10, block=20) == []
    own_server.kill()
    add(1, "1-0")
    assert names(reader.xread(cursors, count=10, block=1000)) == [(STREAMS[1], ["1-0"])]
    cursors[STREAMS[1]] = "1-0"
    assert reader.xread(cursors, count=10, block=20) == []
    own_server.start()
    with own_server.admin() as admin:
        admin.xadd(STREAMS[3], {"f": "3"}, id="7-0")
    rows: Any = []
    while not rows:
        rows = reader.xread(cursors, count=10, block=500)
    assert names(rows) == [(STREAMS[3], ["7-0"])]
    reader.close()
    for server in servers:
        server.close()
