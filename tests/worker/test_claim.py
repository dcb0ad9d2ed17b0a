"""The script that claims, and the wait for what it may claim; on real servers."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.keys import GROUP, Keys
from tokenmill.producer.params import SamplingParams
from tokenmill.producer.wire import Request
from tokenmill.worker import queue as worker_queue
from tokenmill.worker.queue import Claim, Queue

pytestmark = pytest.mark.everywhere

KEYS = Keys()
AMPLE = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}
MakeQueue = Callable[..., Queue]
MakeRequest = Callable[..., Request]


def ids(claims: list[Claim]) -> list[str]:
    return [claim.request_id for claim in claims]


def test_claim_gives_what_was_enqueued(
    client: Client, make_queue: MakeQueue, make_request: MakeRequest
) -> None:
    request = make_request("Why?", params=SamplingParams(max_tokens=7), metadata={"row": "1"})
    client.submit_many([request])
    (claim,) = make_queue().claim(**AMPLE)
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
    (claim,) = queue.claim(**AMPLE)
    queue.release(parked, claim.epoch, undo=True)
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


def test_claim_ends_the_overdue_it_meets(
    client: Client, make_queue: MakeQueue, make_request: MakeRequest
) -> None:
    late = make_request("x", deadline_ms=1)
    client.submit_many([late])
    assert make_queue().claim(**AMPLE) == []
    assert client.result(late.request_id, timeout_s=5).finish_reason == "expired"


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
    (claim,) = queue.claim(**AMPLE)
    assert queue.wait(0.01) is False
    queue.release(request_id, claim.epoch, undo=True, delay_ms=50)
    assert queue.wait(5) is True  # the release itself: who waits learns how long, by a claim
    assert queue.claim(**AMPLE) == []
    assert queue.wait(5) is True
    assert ids(queue.claim(**AMPLE)) == [request_id]


def test_what_never_fits_the_worker_blocks_nobody(client: Client, make_queue: MakeQueue) -> None:
    sizes = {client.submit([1] * size, max_tokens=1): size for size in (1, 500, 2)}
    queue = make_queue()
    room = {**AMPLE, "kv_tokens": 50, "tokens": 60}
    assert [sizes[i] for i in ids(queue.claim(**room, kv_total=300, limit=1))] == [1]
    assert [sizes[i] for i in ids(queue.claim(**room, kv_total=300))] == [500, 2]


def test_behind_a_window_a_long_prompt_takes_what_it_holds(
    client: Client, make_queue: MakeQueue
) -> None:
    sizes = {client.submit([1] * size, max_tokens=1): size for size in (1, 900, 900, 900, 2000)}
    queue = make_queue()
    room: dict[str, Any] = {"sequences": 9, "tokens": 9999, "kv_total": 1500, "kv_each": 100}
    assert [sizes[i] for i in ids(queue.claim(kv_tokens=250, **room))] == [1, 900, 900]
    # One that is longer than all of the cache is claimed to be refused.
    assert [sizes[i] for i in ids(queue.claim(kv_tokens=100, **room))] == [900, 2000]


def test_empty_lanes_count_as_scanned(server: redis.Redis, make_queue: MakeQueue) -> None:
    for number in range(20):
        server.zadd(KEYS.lanes(1), {f"gone{number}": number})
    queue = make_queue()
    arguments: list[Any] = [
        "w1",
        15_000,
        1,
        8,
        100,
        100,
        8,
        5,
        5,
        0,
        0,
        0,
    ]  # five references at most
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
