"""Each script but the claim by itself, on real servers, called as a worker calls it."""

from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, InvalidRequest
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator
from tokenmill.producer.wire import Request, Usage, WorkerInfo
from tokenmill.worker.queue import Claim, Queue, Verdict
from writes import end, piece

pytestmark = pytest.mark.everywhere

KEYS = Keys()
AMPLE = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}
MakeQueue = Callable[..., Queue]
MakeRequest = Callable[..., Request]


def ids(claims: list[Claim]) -> list[str]:
    return [claim.request_id for claim in claims]


def state(server: redis.Redis, request_id: str) -> dict[str, str]:
    fields: Any = server.hgetall(KEYS.record(request_id))
    return {name.decode(): value.decode("latin1") for name, value in fields.items()}


def only(claims: list[Claim]) -> Claim:
    assert len(claims) == 1
    return claims[0]


def expire_lease(server: redis.Redis, worker_id: str) -> None:
    server.zadd(KEYS.workers, {worker_id: 1})


def left_over(server: redis.Redis) -> list[str]:
    """Keys that must be gone once every request has ended and a worker has looked."""
    kept = ("r", "o", "ctl", "dead", "workers", "w", "settings", "shards")
    names = [key.decode().removeprefix(KEYS.tag + ":") for key in server.scan_iter()]
    return [name for name in names if name.partition(":")[0] not in kept]


def test_append_commits_once_and_in_order(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    client.submit("x")
    queue = make_queue()
    claim = only(queue.claim(**AMPLE))
    first, second = piece(claim, 0, 11, 12, text="a"), piece(claim, 2, 13, text="b")
    assert queue.append([first]) == [Verdict.OK]
    assert queue.append([first]) == [Verdict.OK]
    assert queue.append([piece(claim, 3, 99)]) == [Verdict.GAP]
    assert queue.append([second, second]) == [Verdict.OK, Verdict.OK]
    assert queue.append([piece(claim, 1, 12, 13, 14)]) == [Verdict.GAP]
    entries: Any = server.xrange(KEYS.output(claim.request_id))
    assert [(name.decode(), fields[b"x"]) for name, fields in entries] == [
        ("2-0", b"a"),
        ("3-0", b"b"),
    ]


def test_empty_append_asks_without_writing(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    client.submit("x")
    queue = make_queue()
    claim = only(queue.claim(**AMPLE))
    assert queue.append([piece(claim, 0)]) == [Verdict.OK]
    assert server.exists(KEYS.output(claim.request_id)) == 0
    client.cancel(claim.request_id)
    assert queue.append([piece(claim, 0)]) == [Verdict.CANCEL]


def test_append_and_finish_take_many_and_refuse_too_many(
    client: Client, make_queue: MakeQueue
) -> None:
    for _ in range(64):
        client.submit("x")
    queue = make_queue()
    claims = queue.claim(**AMPLE)
    assert queue.append([piece(claim, 0, 5) for claim in claims]) == [Verdict.OK] * 64
    assert queue.finish([end(claim, 1, 6, before=(5,)) for claim in claims]) == [Verdict.OK] * 64
    with pytest.raises(InvalidRequest, match="at most 64"):
        queue.append([piece(claims[0], 0, 1)] * 65)
    with pytest.raises(InvalidRequest, match="finish_reason must be"):
        queue.finish([end(claims[0], 0, reason="done")])


def test_finish_ends_once_and_leaves_no_index(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    client.submit("x")
    queue = make_queue()
    Operator(server, KEYS).configure(result_ttl_s=100)
    claim = only(queue.claim(**AMPLE))
    queue.append([piece(claim, 0, 11)])
    assert queue.finish([end(claim, 0, 11, 12)]) == [Verdict.GAP]
    last = end(claim, 1, 12, 13, before=(11,), text="tail")
    assert queue.finish([last]) == [Verdict.OK]
    assert queue.finish([last]) == [Verdict.OK]
    assert queue.append([piece(claim, 3, 14)]) == [Verdict.FENCED]
    entries: Any = server.xrange(KEYS.output(claim.request_id))
    assert [name.decode() for name, _ in entries] == ["1-0", "3-1"]
    queue.claim(**AMPLE)
    assert left_over(server) == []
    for key in (KEYS.record(claim.request_id), KEYS.output(claim.request_id)):
        assert 0 < server.pttl(key) <= 100_000
    result = client.result(claim.request_id, timeout_s=5)
    assert (result.token_ids, result.text) == ((11, 12, 13), "tail")
    assert result.usage == Usage(prompt_tokens=3, completion_tokens=3)


def test_results_are_kept_a_day_unless_configured(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    client.submit("x")
    queue = make_queue()
    claim = only(queue.claim(**AMPLE))
    assert server.pttl(KEYS.record(claim.request_id)) == -1
    queue.finish([end(claim, 0)])
    assert 86_390_000 < server.pttl(KEYS.record(claim.request_id)) <= 86_400_000
    with pytest.raises(InvalidRequest, match="result_ttl_s must be"):
        Operator(server, KEYS).configure(result_ttl_s=0)
    with pytest.raises(InvalidRequest, match="max_live must be"):
        Operator(server, KEYS).configure(max_live=0)


def test_release_resumes_at_the_committed_tokens(client: Client, make_queue: MakeQueue) -> None:
    client.submit("x")
    old, new = make_queue("w1"), make_queue("w2")
    claim = only(old.claim(**AMPLE))
    old.append([piece(claim, 0, 7, 8)])
    old.append([piece(claim, 2, 2**31)])
    assert old.release(claim.request_id, claim.epoch, undo=True) is Verdict.OK
    assert old.release(claim.request_id, claim.epoch, undo=True) is Verdict.OK
    again = only(new.claim(**AMPLE))
    assert again.token_ids == (7, 8, 2**31)
    assert (again.epoch, again.attempts) == (3, 1)
    assert old.append([piece(claim, 3, 9)]) == [Verdict.FENCED]
    assert old.finish([end(claim, 3)]) == [Verdict.FENCED]
    assert old.release(claim.request_id, claim.epoch, undo=True) is Verdict.FENCED
    assert new.append([piece(again, 3, 9)]) == [Verdict.OK]


def test_failed_attempts_back_off_and_end_as_dead_letters(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x")
    queue = make_queue(max_attempts=3)
    delays = []
    for attempt in (1, 2, 3):
        claim = only(queue.claim(**AMPLE))
        assert claim.attempts == attempt
        queue.release(request_id, claim.epoch, undo=False, reason="kernel panic")
        assert queue.claim(**AMPLE) == []
        due: Any = server.zscore(KEYS.park, request_id)
        seconds, micros = server.time()
        delays.append(due - seconds * 1000 - micros / 1000)
        server.zadd(KEYS.park, {request_id: 0})
    for delay, full in zip(delays, (1000, 2000, 4000), strict=True):
        assert full * 0.5 - 500 <= delay <= full
    assert queue.claim(**AMPLE) == []
    result = client.result(request_id, timeout_s=5)
    assert result.finish_reason == "error"
    assert result.reason == "given up after 3 attempts: kernel panic"
    letters: Any = server.xrange(KEYS.dead)
    [(_, letter)] = letters
    assert letter[b"id"].decode() == request_id
    assert "payload" in state(server, request_id)
    assert left_over(server) == []


def test_reap_parks_what_dead_workers_ran(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    running, asked = client.submit("x"), client.submit("y")
    dead, alive = make_queue("dead"), make_queue("alive")
    claims = dead.claim(**AMPLE)
    dead.append([piece(claims[0], 0, 4)])
    client.cancel(asked)
    assert alive.reap() == 0
    expire_lease(server, "dead")
    assert alive.reap() == 2
    assert alive.reap() == 0
    resumed = only(alive.claim(**AMPLE))
    assert (resumed.request_id, resumed.token_ids, resumed.attempts) == (running, (4,), 2)
    assert client.result(asked, timeout_s=5).finish_reason == "cancelled"
    assert dead.append([piece(claims[0], 1, 5)]) == [Verdict.FENCED]
    alive.finish([end(resumed, 1)])
    alive.claim(**AMPLE)
    assert left_over(server) == []


def test_every_call_renews_the_lease(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    client.submit("x")
    queue = make_queue(lease_ms=60_000)
    claim = only(queue.claim(**AMPLE))
    for call in (
        queue.renew,
        lambda: queue.append([piece(claim, 0, 1)]),
        lambda: queue.claim(**AMPLE),
        lambda: queue.finish([end(claim, 1)]),
    ):
        expire_lease(server, "w1")
        call()
        seconds, _ = server.time()
        lease: Any = server.zscore(KEYS.workers, "w1")
        assert 50_000 < lease - seconds * 1000 < 70_000


@pytest.mark.parametrize("where", ["waiting", "parked", "running"])
def test_overdue_requests_expire_with_what_they_have(
    client: Client, server: redis.Redis, make_queue: MakeQueue, where: str
) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    if where != "waiting":
        claim = only(queue.claim(**AMPLE))
        queue.append([piece(claim, 0, 1, 2, text="so far")])
        if where == "parked":
            queue.release(request_id, claim.epoch, undo=False)
    server.hset(KEYS.record(request_id), "deadline", 1)
    server.zadd(KEYS.live, {request_id: 1})
    assert queue.reap() == 1
    result = client.result(request_id, timeout_s=5)
    assert (result.finish_reason, result.reason) == ("expired", "deadline passed")
    assert result.text == ("" if where == "waiting" else "so far")
    if where == "running":
        assert queue.append([piece(claim, 2, 3)]) == [Verdict.FENCED]
    assert queue.claim(**AMPLE) == []
    assert left_over(server) == []


@pytest.mark.parametrize("where", ["waiting", "parked"])
def test_cancel_of_what_does_not_run_is_at_once(
    client: Client, server: redis.Redis, make_queue: MakeQueue, where: str
) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    if where == "parked":
        claim = only(queue.claim(**AMPLE))
        queue.release(request_id, claim.epoch, undo=False)
    assert client.cancel(request_id) is True
    assert client.result(request_id, timeout_s=5).finish_reason == "cancelled"
    assert client.cancel(request_id) is True
    assert queue.claim(**AMPLE) == []
    assert left_over(server) == []


def test_cancel_of_what_runs_is_seen_by_its_worker(client: Client, make_queue: MakeQueue) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    claim = only(queue.claim(**AMPLE))
    assert client.cancel(request_id) is True
    assert queue.append([piece(claim, 0, 1)]) == [Verdict.CANCEL]
    assert queue.finish([end(claim, 0, 1, reason="cancelled")]) == [Verdict.OK]
    assert client.result(request_id, timeout_s=5).token_ids == (1,)


def test_release_of_a_cancelled_request_ends_it(client: Client, make_queue: MakeQueue) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    claim = only(queue.claim(**AMPLE))
    client.cancel(request_id)
    queue.release(request_id, claim.epoch, undo=True)
    assert client.result(request_id, timeout_s=5).finish_reason == "cancelled"


def test_register_is_seen_until_retired(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    info = WorkerInfo(
        worker_id="w1",
        model="m",
        host="h",
        pid=12,
        started_ms=34,
        version="0.1",
        adapters=("sql",),
        quantization="int8",
        kv_cache_dtype="bfloat16",
    )
    queue = make_queue("w1")
    queue.register(info)
    assert client.workers() == [info]
    expire_lease(server, "w1")
    assert client.workers() == []
    queue.renew()
    assert client.workers() == [info]
    request_id = client.submit("x")
    queue.claim(**AMPLE)
    queue.retire()
    assert client.workers() == []
    assert ids(make_queue("w2").claim(**AMPLE)) == [request_id]
    assert server.exists(KEYS.own("w1"), KEYS.worker("w1")) == 0


def test_a_full_server_is_drained(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    """At maxmemory nothing is enqueued, and everything a worker does goes on."""
    request_id, released = client.submit("x"), client.submit("y")
    info = WorkerInfo(worker_id="w1", model="m", host="h", pid=12, started_ms=34, version="0.1")
    queue = make_queue("w1")
    server.config_set("maxmemory", 1)
    try:
        with pytest.raises(Busy):
            client.submit("z")
        queue.register(info)
        queue.wake()
        claim, other = queue.claim(**AMPLE)
        assert queue.append([piece(claim, 0, 1)]) == [Verdict.OK]
        assert queue.finish([end(claim, 1)]) == [Verdict.OK]
        assert queue.release(released, other.epoch, undo=True) is Verdict.OK
        queue.claim(**AMPLE)
        queue.renew()
        queue.retire()
    finally:
        server.config_set("maxmemory", 0)
    assert client.workers() == []
    assert client.result(request_id, timeout_s=5).ok
    assert ids(make_queue("w2").claim(**AMPLE)) == [released]


def test_what_ended_before_an_error_has_left_every_index(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    good, last = client.submit("good"), client.submit("last")
    first, second = queue.claim(**AMPLE)
    server.set(KEYS.dead, "no stream")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        queue.finish([end(first, 0, 7), end(second, 0, reason="error")])
    assert queue.finish([end(first, 0, 7)]) == [Verdict.OK]
    assert server.zrange(KEYS.live, 0, -1) == [last.encode()]
    assert server.smembers(KEYS.own("w1")) == {last.encode()}
    assert server.xlen(KEYS.lane(1, "default")) == 1
    assert state(server, good)["finish"] == "stop"
