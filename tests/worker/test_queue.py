"""Each script by itself, on real servers, called as a worker calls it."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, InvalidRequest
from tokenmill.producer.keys import GROUP, Keys
from tokenmill.producer.operator import Operator
from tokenmill.producer.params import SamplingParams
from tokenmill.producer.wire import Request, Usage, WorkerInfo, chain_digest
from tokenmill.worker import queue as worker_queue
from tokenmill.worker.queue import Append, Claim, Finish, Queue, Verdict

pytestmark = pytest.mark.everywhere

KEYS = Keys()
AMPLE = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}
MakeQueue = Callable[..., Queue]
MakeRequest = Callable[..., Request]


def piece(claim: Claim, start: int, *token_ids: int, text: str = "") -> Append:
    return Append(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=token_ids,
        text=text,
        digest=chain_digest("", (*claim.token_ids, *token_ids)),
    )


def end(
    claim: Claim,
    start: int,
    *token_ids: int,
    before: tuple[int, ...] = (),
    reason: str = "stop",
    text: str = "",
) -> Finish:
    return Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=token_ids,
        text=text,
        digest=chain_digest("", (*claim.token_ids, *before, *token_ids)),
        finish_reason=reason,
        usage=Usage(prompt_tokens=3, completion_tokens=start + len(token_ids)),
    )


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


def test_claim_gives_what_was_enqueued(
    client: Client, make_queue: MakeQueue, make_request: MakeRequest
) -> None:
    request = make_request("Why?", params=SamplingParams(max_tokens=7), metadata={"row": "1"})
    client.submit_many([request])
    claim = only(make_queue().claim(**AMPLE))
    assert claim == Claim(
        request_id=request.request_id, epoch=1, token_ids=(), attempts=1, request=request
    )
    assert make_queue("w2").claim(**AMPLE) == []


def test_claim_stops_at_sequences_tokens_and_limit(client: Client, make_queue: MakeQueue) -> None:
    for _ in range(12):
        client.submit([1] * 10, max_tokens=1)
    queue = make_queue()
    assert len(queue.claim(**{**AMPLE, "sequences": 2})) == 2
    assert len(queue.claim(**AMPLE, limit=3)) == 3
    assert queue.claim(**{**AMPLE, "sequences": 0}) == []
    assert queue.claim(**{**AMPLE, "tokens": 0}) == []
    # 10 + 10 leave 1 of 21 free: the third prompt starts in this step and ends in the next.
    assert len(queue.claim(**{**AMPLE, "tokens": 21})) == 3


def test_claim_never_overshoots_kv_unless_nothing_is_held(
    client: Client, make_queue: MakeQueue
) -> None:
    for _ in range(3):
        client.submit([1] * 100, max_tokens=1000)
    queue = make_queue()
    need = 100 + 256
    assert len(queue.claim(**{**AMPLE, "kv_tokens": 2 * need - 1})) == 1
    assert queue.claim(**{**AMPLE, "kv_tokens": need - 1}) == []
    assert len(queue.claim(**{**AMPLE, "kv_tokens": need})) == 1
    assert len(make_queue("w2").claim(**{**AMPLE, "kv_tokens": 1})) == 1


def test_one_that_does_not_fit_is_not_overtaken(client: Client, make_queue: MakeQueue) -> None:
    first, big, small = (client.submit([1] * size, max_tokens=1) for size in (1, 50, 1))
    queue = make_queue()
    assert ids(queue.claim(**{**AMPLE, "kv_tokens": 20})) == [first]
    assert queue.claim(**{**AMPLE, "kv_tokens": 20}) == []
    assert ids(queue.claim(**AMPLE)) == [big, small]


def test_parked_then_priorities_in_order(client: Client, make_queue: MakeQueue) -> None:
    parked = client.submit("p", priority=2)
    queue = make_queue()
    queue.release(parked, only(queue.claim(**AMPLE)).epoch, undo=True)
    low, normal, high = (client.submit("x", priority=priority) for priority in (2, 1, 0))
    assert ids(queue.claim(**AMPLE)) == [parked, high, normal, low]


def test_lanes_share_by_tokens(server_url: str, make_queue: MakeQueue) -> None:
    with Client(server_url, tenant="many") as many, Client(server_url, tenant="one") as one:
        for _ in range(20):
            many.submit([1] * 10, max_tokens=10)
        late = one.submit([1] * 10, max_tokens=10)
        costly = one.submit([1] * 90, max_tokens=10)
        last = one.submit([1] * 10, max_tokens=10)
    claims = make_queue().claim(**AMPLE)
    order = ids(claims)
    assert order.index(late) <= 1
    assert order.index(costly) <= 3
    # Having had 120 tokens, the tenant waits until the other had as many: 6 of 20 each.
    assert 7 <= order.index(last) <= 9
    assert len(order) == 23


def test_a_lane_that_comes_back_has_no_credit(server_url: str, make_queue: MakeQueue) -> None:
    queue = make_queue()
    with Client(server_url, tenant="busy") as busy, Client(server_url, tenant="back") as back:
        for _ in range(8):
            busy.submit([1] * 10, max_tokens=10)
        queue.claim(**AMPLE, limit=4)
        returned = [back.submit([1] * 10, max_tokens=10) for _ in range(3)]
        order = ids(queue.claim(**AMPLE))
    assert [request_id in returned for request_id in order[:6]].count(True) == 3
    assert not all(request_id in returned for request_id in order[:3])


def test_a_repeated_claim_returns_the_same(
    client: Client, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_ids = [client.submit("x") for _ in range(4)]
    queue = make_queue()
    real: Any = queue._server.execute_command

    def lose_answer(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise redis.exceptions.TimeoutError("answer lost")

    with monkeypatch.context() as patch:
        patch.setattr(queue._server, "execute_command", lose_answer)
        with pytest.raises(redis.exceptions.TimeoutError, match="lost"):
            queue.claim(**AMPLE, limit=2)
    again = queue.claim(**AMPLE, limit=1)
    assert ids(again) == request_ids[:2]
    assert [claim.epoch for claim in again] == [1, 1]
    assert ids(queue.claim(**AMPLE)) == request_ids[2:]


def test_unreadable_payload_ends_alone(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    bad, good = client.submit("x"), client.submit("y")
    server.hset(KEYS.record(bad), "payload", b"\xc1")
    assert ids(make_queue().claim(**AMPLE)) == [good]
    result = client.result(bad, timeout_s=5)
    assert (result.finish_reason, result.ok) == ("error", False)
    assert "payload must be" in result.reason


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


def test_claim_ends_the_overdue_it_meets(
    client: Client, make_queue: MakeQueue, make_request: MakeRequest
) -> None:
    late = make_request("x", deadline_ms=1)
    client.submit_many([late])
    assert make_queue().claim(**AMPLE) == []
    assert client.result(late.request_id, timeout_s=5).finish_reason == "expired"


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


def test_waiting_tombstones_leave_the_lag_known(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    requests = [client.submit("x") for _ in range(5)]
    client.cancel(requests[1])
    queue = make_queue()
    queue.claim(**AMPLE, limit=1)
    [group] = server.xinfo_groups(KEYS.lane(1, "default"))
    assert group["name"] == GROUP.encode()
    assert group["lag"] == 4
    assert ids(queue.claim(**AMPLE)) == requests[2:]


def test_claim_passes_over_more_ended_references_than_one_call_scans(
    client: Client, make_queue: MakeQueue
) -> None:
    requests = [client.new_request("x") for _ in range(300)]
    client.submit_many(requests)
    for request in requests[:-1]:
        client.cancel(request.request_id)
    assert ids(make_queue().claim(**AMPLE)) == [requests[-1].request_id]


def test_wait_wakes_for_enqueue_and_for_due_parked(client: Client, make_queue: MakeQueue) -> None:
    queue = make_queue()
    assert queue.wait(5) is True  # the first: what came before was not seen
    assert queue.wait(0.01) is False
    request_id = client.submit("x")
    assert queue.wait(5) is True
    claim = only(queue.claim(**AMPLE))
    assert queue.wait(0.01) is False
    queue.release(request_id, claim.epoch, undo=True, delay_ms=50)
    assert queue.wait(5) is True  # the release itself: who waits learns how long, by a claim
    assert queue.claim(**AMPLE) == []
    assert queue.wait(5) is True
    assert ids(queue.claim(**AMPLE)) == [request_id]


def test_register_is_seen_until_retired(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    info = WorkerInfo(worker_id="w1", model="m", host="h", pid=12, started_ms=34, version="0.1")
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


def test_what_never_fits_the_worker_blocks_nobody(client: Client, make_queue: MakeQueue) -> None:
    sizes = {client.submit([1] * size, max_tokens=1): size for size in (1, 500, 2)}
    queue = make_queue()
    room = {**AMPLE, "kv_tokens": 50, "tokens": 60}
    assert [sizes[i] for i in ids(queue.claim(**room, kv_total=300, limit=1))] == [1]
    assert [sizes[i] for i in ids(queue.claim(**room, kv_total=300))] == [500, 2]


def test_empty_lanes_count_as_scanned(server: redis.Redis, make_queue: MakeQueue) -> None:
    for number in range(20):
        server.zadd(KEYS.lanes(1), {f"gone{number}": number})
    queue = make_queue()
    arguments: list[Any] = ["w1", 15_000, 1, 8, 100, 100, 8, 5, 5, 0, 0]  # five references at most
    more, claims, *_ = queue._run(worker_queue._CLAIM, *arguments)
    assert (more, claims, server.zcard(KEYS.lanes(1))) == (1, [], 15)


def test_wait_sleeps_while_what_is_due_does_not_fit(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    first, big = client.submit("x", max_tokens=1), client.submit([1] * 500, max_tokens=1)
    queue = make_queue()
    assert queue.wait(5) is True
    claims = queue.claim(**AMPLE)
    assert ids(claims) == [first, big]
    queue.release(big, claims[1].epoch, undo=True)
    assert queue.claim(**{**AMPLE, "kv_tokens": 50}) == []
    started = time.monotonic()
    assert queue.wait(0.2) is False
    assert time.monotonic() - started >= 0.15
    server.zadd(KEYS.park, {big: _server_ms(server) + 80})
    assert queue.claim(**AMPLE) == []
    assert queue.wait(5) is True


def _server_ms(server: redis.Redis) -> int:
    seconds, micros = server.time()
    return int(seconds * 1000 + micros // 1000)


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


def test_an_interrupted_claim_is_found_by_its_repeat(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    good, last = client.submit("good"), client.submit("last")
    server.hset(KEYS.record(last), "attempts", 5)  # given up by the next claim
    server.set(KEYS.dead, "no stream")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        queue.claim(**AMPLE)
    assert ids(queue.claim(**AMPLE)) == [good]
    assert server.smembers(KEYS.own("w1")) == {good.encode()}
