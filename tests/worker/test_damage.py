"""What whoever may write keys can do to one request: it must not stop the others, or a worker."""

from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.keys import GROUP, Keys
from tokenmill.worker.queue import Append, Queue

MakeQueue = Callable[..., Queue]
KEYS = Keys()
AMPLE: dict[str, Any] = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}


def claimed(queue: Queue) -> set[str]:
    return {claim.request_id for claim in queue.claim(**AMPLE)}


@pytest.mark.parametrize("name", ["epoch", "offset", "attempts", "deadline", "cost", "most"])
@pytest.mark.parametrize("value", [b"", b"abc", b"-1", b"inf", b"nan", b"1.5", b"9" * 30, b"\xff"])
def test_a_number_that_is_none_ends_its_request_alone(
    server: redis.Redis, client: Client, make_queue: MakeQueue, name: str, value: bytes
) -> None:
    damaged, sound = client.submit("x"), client.submit("y")
    server.hset(KEYS.record(damaged), name, value)
    queue = make_queue()
    assert claimed(queue) == {sound}
    result = client.result(damaged, timeout_s=5)
    assert result.finish_reason == "error"
    assert result.reason == f"the record is damaged: {name} must be a whole number"
    assert server.zscore(KEYS.live, damaged) is None


@pytest.mark.parametrize("name", ["worker", "tenant", "priority"])
def test_a_missing_field_ends_its_request_alone(
    server: redis.Redis, client: Client, make_queue: MakeQueue, name: str
) -> None:
    damaged, sound = client.submit("x"), client.submit("y")
    server.hdel(KEYS.record(damaged), name)
    assert claimed(make_queue()) == {sound}
    assert f"{name} must be given" in client.result(damaged, timeout_s=5).reason


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "x"},
        {"foo": "bar"},
        {"cost": "1", "most": "1", "id": "x"},
        {"id": "x", "cost": "nan", "most": "1"},
        {"id": b"\xff", "cost": "1", "most": "1"},
        {"id": "x", "cost": "-5", "most": "1"},
    ],
)
def test_a_reference_that_no_enqueue_wrote_is_dropped(
    server: redis.Redis, client: Client, make_queue: MakeQueue, fields: dict[Any, Any]
) -> None:
    lane = KEYS.lane(1, "default")
    server.xadd(lane, fields)
    server.xgroup_create(lane, GROUP, 0)
    request_id = client.submit("x")
    assert claimed(make_queue()) == {request_id}
    assert server.xlen(lane) == 1


def test_an_id_that_is_no_text_is_not_claimed(
    server: redis.Redis, client: Client, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x")
    record: Any = server.hgetall(KEYS.record(request_id))
    server.hset(f"{KEYS.tag}:r:".encode() + b"\xff", mapping={**record, b"state": b"park"})
    server.zadd(KEYS.park, {b"\xff": 1})
    assert claimed(make_queue()) == {request_id}
    assert server.zcard(KEYS.park) == 0


@pytest.mark.parametrize("junk", [{"t": b"abc"}, {"x": "y"}, {"t": b"1234"}])
def test_tokens_that_are_not_as_many_as_the_offset_end_the_request(
    server: redis.Redis, client: Client, make_queue: MakeQueue, junk: dict[Any, Any]
) -> None:
    damaged, sound = client.submit("x"), client.submit("y")
    server.xadd(KEYS.output(damaged), junk, id="5-0")
    server.hset(KEYS.record(damaged), "offset", 5)
    assert claimed(make_queue()) == {sound}
    row = server.hmget(KEYS.record(damaged), "state", "reason")
    assert row == [b"end", b"the tokens written so far are gone"]


def test_entries_in_the_way_of_the_end_are_replaced(
    server: redis.Redis, client: Client, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x")
    server.xadd(KEYS.output(request_id), {"x": "y"}, id="9999-0")
    client.cancel(request_id)
    assert client.result(request_id, timeout_s=5).finish_reason == "cancelled"


def test_what_is_never_due_does_not_end_a_wait(
    server: redis.Redis, client: Client, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    queue.claim(**AMPLE)
    server.zadd(KEYS.park, {"x": float("inf")})
    assert queue.wait(0.01) is False


@pytest.mark.parametrize("value", ["abc", "-1", "nan", "inf", "0"])
def test_settings_that_are_no_numbers_are_passed_over(
    server: redis.Redis, client: Client, make_queue: MakeQueue, value: str
) -> None:
    names = ["quota:default", "weight:default"]
    names += [] if value == "0" else ["paused", "max_live", "result_ttl_ms", "dead_ttl_ms"]
    server.hset(KEYS.settings, mapping=dict.fromkeys(names, value))
    request_id = client.submit("x")
    assert claimed(make_queue()) == {request_id}
    client.cancel(request_id)
    assert make_queue().append(
        [Append(request_id=request_id, epoch=1, start=0, token_ids=(), text="", digest="")]
    )


@pytest.mark.parametrize("key", [KEYS.inbox, KEYS.lane(1, "other")])
def test_a_key_of_another_type_does_not_stop_other_lanes(
    server: redis.Redis, client: Client, make_queue: MakeQueue, key: str
) -> None:
    server.set(key, "x")
    server.zadd(KEYS.lanes(1), {"other": -1})
    request_id = client.submit("x")
    assert claimed(make_queue()) == {request_id}


def test_a_claim_without_its_ids_is_made_again(
    server: redis.Redis, client: Client, make_queue: MakeQueue
) -> None:
    server.hset(KEYS.worker("w1"), "claim_seq", 1)
    queue = make_queue("w1")
    assert claimed(queue) == set()
    request_id = client.submit("x")
    assert claimed(queue) == {request_id}
