"""A queue of several shards: on one server, and over the nodes of a cluster."""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tokenmill.producer.client import Client
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.request_id import new_request_id
from tokenmill.producer.shards import SHARDS, Shards
from tokenmill.producer.wire import WorkerInfo
from tokenmill.worker.queue import Claim, Queue, Verdict
from tokenmill.worker.shards import LOOK_S, QueueLike, ShardedQueue, queue_of
from writes import end, piece

COUNT = 5
AMPLE = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}
MakeQueue = Callable[..., ShardedQueue]

pytestmark = pytest.mark.everywhere


@pytest.fixture
def server_url(server_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> str:
    """With as many shards as these tests want."""
    monkeypatch.setenv(SHARDS, str(COUNT))
    for key in server.keys("*:shards"):
        server.delete(key)
    return server_url


@pytest.fixture
def make_sharded(server_url: str) -> Iterator[MakeQueue]:
    opened: list[Shards] = []

    def make(worker_id: str = "w1", **options: Any) -> ShardedQueue:
        opened.append(Shards(server_url, "default"))
        queue = queue_of(opened[-1], worker_id, **options)
        assert isinstance(queue, ShardedQueue)
        return queue

    yield make
    for shards in opened:
        shards.close()


def claim_all(queue: QueueLike, count: int, **room: int) -> list[Claim]:
    """As a worker does: what comes to a shard that was empty is heard of by waiting."""
    claims: list[Claim] = []
    while len(claims) < count:
        given = queue.claim(**{**AMPLE, **room})
        assert given or queue.wait(2.0), f"{len(claims)} of {count}"
        claims += given
    return claims


def end_lease(queue: QueueLike, worker: str) -> None:
    """As if its time had passed on every shard."""
    for part in queue._queues:  # type: ignore[attr-defined]
        part._server.zadd(part.keys.workers, {worker: 1})


def note(calls: list[int], number: int) -> int:
    calls.append(number)
    return 0


def shard_of(request_id: str) -> int:
    return int(request_id.partition(".")[0])


def test_requests_are_spread_and_all_are_served(client: Client, make_sharded: MakeQueue) -> None:
    ids = client.submit_many(client.new_request(f"p{n}", max_tokens=4) for n in range(200))
    spread = [sum(shard_of(i) == n for i in ids) for n in range(COUNT)]
    assert min(spread) > 15
    assert client.live() == 200
    queue = make_sharded()
    claims = claim_all(queue, 200, sequences=1000)
    assert sorted(claim.request_id for claim in claims) == sorted(ids)
    assert queue.claim(**AMPLE) == []
    for first in range(0, 200, 64):
        some = claims[first : first + 64]
        assert set(queue.append([piece(c, 0, 65, 66, text="AB") for c in some])) == {Verdict.OK}
        assert set(queue.finish([end(c, 2) for c in some])) == {Verdict.OK}
    results = [client.result(request_id) for request_id in ids]
    assert {result.text for result in results} == {"AB"}
    assert client.live() == 0


def test_a_repeated_submit_finds_its_shard(client: Client) -> None:
    ids = [client.id_for(f"row {n}") for n in range(20)]
    assert len({shard_of(request_id) for request_id in ids}) == COUNT
    for _ in range(2):
        for request_id in ids:
            assert client.submit("x", request_id=request_id) == request_id
    assert client.live() == 20
    with pytest.raises(InvalidRequest, match="an id of shard 0 to 4 of queue default"):
        client.submit("x", request_id=new_request_id(COUNT))


def test_claims_take_turns(client: Client, make_sharded: MakeQueue) -> None:
    for number in range(COUNT):
        for _ in range(4):
            client.submit("x", request_id=new_request_id(number))
    queue = make_sharded()
    turns = [queue.claim(**AMPLE, limit=2) for _ in range(2 * COUNT)]
    shards = [[shard_of(claim.request_id) for claim in claims] for claims in turns]
    assert sorted(shards[:COUNT]) == [[number] * 2 for number in range(COUNT)]
    assert sorted(shards[COUNT:]) == [[number] * 2 for number in range(COUNT)]


def test_what_fits_nobody_waits_until_all_shards_are_idle(
    client: Client, make_sharded: MakeQueue
) -> None:
    small = client.submit([1] * 10, max_tokens=1, request_id=new_request_id(0))
    queue = make_sharded()
    (held,) = claim_all(queue, 1, kv_tokens=100)
    assert held.request_id == small
    large = client.submit([1] * 1000, max_tokens=1, request_id=new_request_id(3))
    for _ in range(COUNT):
        assert queue.claim(sequences=10, tokens=1000, kv_tokens=50) == []
    queue.finish([end(held, 0)])
    assert claim_all(queue, 1, kv_tokens=50)[0].request_id == large


def test_verdicts_come_in_the_order_of_the_writes(client: Client, make_sharded: MakeQueue) -> None:
    for number in (2, 0, 4, 2):
        client.submit("x", request_id=new_request_id(number))
    queue = make_sharded()
    claims = claim_all(queue, 4)
    client.cancel(claims[1].request_id)
    stale = [claims[2].request_id]
    queue.release(stale[0], claims[2].epoch, undo=True)
    verdicts = queue.append([piece(claim, 0, 65, text="A") for claim in claims])
    assert verdicts == [Verdict.OK, Verdict.CANCEL, Verdict.FENCED, Verdict.OK]
    ends = [end(claims[0], 1), end(claims[1], 0, reason="cancelled"), end(claims[3], 0)]
    assert queue.finish(ends) == [Verdict.OK, Verdict.OK, Verdict.GAP]


def test_an_idle_worker_hears_of_every_shard(client: Client, make_sharded: MakeQueue) -> None:
    queue = make_sharded()
    while queue.wait(0):  # until each has been asked once
        assert queue.claim(**AMPLE) == []
    for number in range(COUNT):
        timer = threading.Timer(0.02, client.submit, ("x",), {"request_id": new_request_id(number)})
        timer.start()
        began = time.monotonic()
        assert queue.wait(5.0)
        assert time.monotonic() - began < 1.0
        # The shard that was heard of is asked first.
        assert [shard_of(claim.request_id) for claim in queue.claim(**AMPLE)] == [number]
        timer.join()
        assert queue.claim(**AMPLE) == []
    began = time.monotonic()
    assert not queue.wait(0.1)
    assert 0.05 < time.monotonic() - began < 1.0


def test_what_is_parked_ends_the_wait(client: Client, make_sharded: MakeQueue) -> None:
    request_id = client.submit("x", request_id=new_request_id(3))
    queue = make_sharded()
    (claim,) = claim_all(queue, 1)
    queue.release(request_id, claim.epoch, undo=True, delay_ms=150)
    deadline = time.monotonic() + 5
    claims: list[Claim] = []
    while not claims:
        assert time.monotonic() < deadline
        claims = queue.claim(**AMPLE) or (queue.wait(5.0) and []) or []
    assert claims[0].request_id == request_id


def test_a_reader_reads_them_all(client: Client, make_sharded: MakeQueue) -> None:
    ids = [client.submit("x", request_id=new_request_id(number)) for number in range(COUNT)]
    queue = make_sharded()
    claims = claim_all(queue, COUNT)
    follower = client.follower()
    for request_id in ids:
        follower.add(request_id)
    assert follower.poll(0.02) == []
    queue.append([piece(claim, 0, 65, text="A") for claim in claims])
    texts = dict.fromkeys(ids, "")
    while "" in texts.values():
        for delta in follower.poll(1.0):
            texts[delta.request_id] += delta.text
    late = client.submit("late", request_id=new_request_id(0))
    (claim,) = claim_all(queue, 1)
    follower.add(late)
    queue.append([piece(claim, 0, 66, text="B")])
    assert [delta.text for delta in follower.poll(1.0)] == ["B"]
    queue.finish([end(claim, 1) for claim in [*claims, claim]])
    ended = set()
    while len(follower):
        ended |= {delta.request_id for delta in follower.poll(1.0) if delta.finish_reason}
    assert ended == {*ids, late}


def test_map_goes_over_all_shards(client: Client, make_sharded: MakeQueue) -> None:
    queue = make_sharded()
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            claims = queue.claim(**AMPLE)
            for claim in claims:
                text = str(claim.request.prompt)
                queue.append([piece(claim, 0, *map(ord, text), text=text)])
            queue.finish([end(c, len(str(c.request.prompt))) for c in claims])
            if not claims:
                queue.wait(0.05)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        prompts = [f"prompt {number}" for number in range(100)]
        results = list(client.map(prompts, window=32, ordered=True, max_tokens=20))
    finally:
        stopped.set()
        thread.join()
    assert [result.text for result in results] == prompts
    assert len({shard_of(result.request_id) for result in results}) == COUNT


def test_a_lost_worker_is_reaped_on_all_shards(client: Client, make_sharded: MakeQueue) -> None:
    ids = [client.submit("x", request_id=new_request_id(number)) for number in range(COUNT)]
    lost, other = make_sharded("lost"), make_sharded("other")
    claim_all(lost, COUNT)
    end_lease(lost, "lost")
    assert other.reap() == COUNT
    assert sorted(claim.request_id for claim in claim_all(other, COUNT)) == sorted(ids)


def test_a_retired_worker_leaves_all_shards(client: Client, make_sharded: MakeQueue) -> None:
    queue = make_sharded()
    info = WorkerInfo(worker_id="w1", model="m", host="h", pid=1, started_ms=1)
    queue.register(info)
    assert client.workers() == [info]
    client.submit("x", request_id=new_request_id(2))
    claim_all(queue, 1)
    queue.retire()
    assert client.workers() == []
    assert claim_all(make_sharded("w2"), 1)


def test_one_shard_that_is_away_keeps_no_other_from_being_served(
    client: Client, make_sharded: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [client.submit("x", request_id=new_request_id(number)) for number in range(COUNT)]
    queue = make_sharded()
    away = queue._queues[2]

    def fail(*_: object, **__: object) -> Any:
        raise RedisConnectionError("away")

    with monkeypatch.context() as patch:
        for name in ("claim", "append", "renew"):
            patch.setattr(away, name, fail)
        claims: list[Claim] = []
        while len(claims) < COUNT - 1:  # the one that is away is told, and keeps nobody waiting
            try:
                claims += queue.claim(**AMPLE)
            except RedisConnectionError:
                assert queue.is_reachable_in_part
        assert not queue.is_whole
        renewed: list[Queue] = []
        for other in queue._queues:
            if other is not away:
                patch.setattr(other, "renew", functools.partial(renewed.append, other))
        with pytest.raises(RedisConnectionError, match="away"):
            queue.renew()
        assert len(renewed) == COUNT - 1
    assert not queue.is_whole
    assert claim_all(queue, 1)[0].request_id == ids[2]
    assert queue.append([piece(claim, 0, 65, text="A") for claim in claims]) == [Verdict.OK] * (
        COUNT - 1
    )
    assert queue.is_whole


def test_a_shard_that_is_away_is_one_outage_and_is_asked_ever_more_rarely(
    client: Client,
    make_sharded: MakeQueue,
    monkeypatch: pytest.MonkeyPatch,
    make_parts: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "tokenmill.worker")
    queue = make_sharded()
    parts = make_parts(queue=queue)
    parts.outage._is_whole = lambda: queue.is_whole
    monkeypatch.setattr(queue, "_clock", parts.clock)
    asked = []

    def fail(*_: object, **room: object) -> Any:
        asked.extend([parts.clock.now] if room else [])
        raise RedisConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(queue._queues[2], "claim", fail)
        patch.setattr(queue._queues[2], "renew", fail)
        for number in range(40):  # of the other shards there is always something
            client.submit("x", max_tokens=1, request_id=new_request_id(number % 2))
            with suppress(RedisConnectionError):
                parts.claim()
            parts.step()
        for _ in range(100):  # and now there is not
            try:
                parts.claim()
            except RedisConnectionError as error:
                parts.outage.lost(error)
            parts.clock.sleep(0.1)
        assert parts.outage.is_on
    gaps = [after - before for before, after in pairwise(asked)]
    assert max(gaps) >= 1.9
    assert len(asked) < 20
    assert not [record for record in caplog.records if "server_back" in record.getMessage()]
    assert sum("server_lost" in record.getMessage() for record in caplog.records) == 1
    parts.clock.sleep(2.0)
    parts.claim()
    assert not parts.outage.is_on
    assert sum("server_back" in record.getMessage() for record in caplog.records) == 1


def test_while_a_shard_is_away_the_others_are_reaped_and_it_a_lease_after(
    client: Client,
    make_sharded: MakeQueue,
    monkeypatch: pytest.MonkeyPatch,
    make_parts: Callable[..., Any],
) -> None:
    queue = make_sharded("keeper")
    parts = make_parts(queue=queue)
    parts.outage._clock = parts.clock
    parts.outage._is_whole = lambda: queue.is_whole
    parts.outage._is_partial = lambda: queue.is_reachable_in_part
    monkeypatch.setattr(queue, "_clock", parts.clock)
    ids = [client.submit("x", request_id=new_request_id(number)) for number in range(COUNT)]
    lost = make_sharded("lost")
    claim_all(lost, COUNT)
    end_lease(lost, "lost")

    def fail(*_: object, **__: object) -> Any:
        raise RedisConnectionError("away")

    def parked() -> list[str]:
        return [name for n, name in enumerate(ids) if client_of(n).zscore(keys_of(n).park, name)]

    def client_of(number: int) -> Any:
        return queue._queues[number]._server

    def keys_of(number: int) -> Any:
        return queue._queues[number].keys

    with monkeypatch.context() as patch:
        for name in ("claim", "append", "renew", "reap", "disown"):
            patch.setattr(queue._queues[2], name, fail)
        disowned: list[int] = []
        for other in queue._queues[3:]:
            patch.setattr(other, "disown", lambda _, n=other.keys.shard: note(disowned, n))
        with pytest.raises(RedisConnectionError, match="away"):
            parts.intake._keep_up()
        assert parked() == [*ids[:2], *ids[3:]]
        assert disowned == [3, 4]
    for seconds, is_reaped in ((6.0, False), (6.0, False), (10.0, True)):
        parts.clock.sleep(seconds)
        parts.intake._keep_up()
        assert (ids[2] in parked()) is is_reaped


def test_an_outage_of_one_shard_keeps_no_other_from_being_reaped_after_it(
    make_sharded: MakeQueue, monkeypatch: pytest.MonkeyPatch, make_parts: Callable[..., Any]
) -> None:
    queue = make_sharded()
    parts = make_parts(queue=queue)
    parts.outage._is_partial = lambda: queue.is_reachable_in_part
    queue._missed(2)
    parts.outage.lost(RedisConnectionError("away"))
    reaped: list[int] = []
    for part in queue._queues:
        monkeypatch.setattr(part, "reap", lambda n=part.keys.shard: note(reaped, n))
    parts.intake._keep_up()
    assert not parts.outage.is_on
    assert reaped == [0, 1, 3, 4]


def test_one_shard_costs_nothing_more(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARDS)
    with Shards(server_url, "alone", count=1) as shards:
        assert type(queue_of(shards, "w")) is Queue
        assert isinstance(shards.reader(), redis.Redis)


def test_an_empty_shard_is_not_asked_until_it_is_heard_of(
    client: Client, make_sharded: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_sharded()
    now = [queue._look_at - LOOK_S]
    monkeypatch.setattr(queue, "_clock", lambda: now[0])
    asked: list[int] = []
    for part in queue._queues:
        real = part.claim

        def claim(part: Queue = part, real: Any = real, **room: Any) -> list[Claim]:
            asked.append(part.keys.shard)
            claims: list[Claim] = real(**room)
            return claims

        monkeypatch.setattr(part, "claim", claim)
    assert queue.claim(**AMPLE) == []
    assert sorted(asked) == list(range(COUNT))
    asked.clear()
    assert queue.claim(**AMPLE) == []
    assert asked == []
    for request_id in (new_request_id(3), new_request_id(3)):
        client.submit("x", request_id=request_id)
    assert queue.wait(1.0)
    assert len(queue.claim(**AMPLE, limit=1)) == 1
    assert len(queue.claim(**AMPLE, limit=1)) == 1  # it had more than was asked for
    assert queue.claim(**AMPLE) == []
    assert set(asked) == {3}
    asked.clear()
    now[0] += LOOK_S  # in case that what was to be heard was lost
    assert queue.claim(**AMPLE) == []
    assert sorted(asked) == list(range(COUNT))
