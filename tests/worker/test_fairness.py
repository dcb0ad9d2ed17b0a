"""Whom a claim takes next: weights of tenants, ageing of priorities, quotas, pause."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import Usage
from tokenmill.worker.queue import Claim, Finish, Queue

MakeQueue = Callable[..., Queue]
KEYS = Keys()
ONE: dict[str, Any] = {"sequences": 1, "tokens": 100_000, "kv_tokens": 1_000_000}


def serve(queue: Queue, tokens: int = 60) -> Claim | None:
    """Claim one request and end it after `tokens` of its tokens."""
    claims = queue.claim(**ONE)
    if not claims:
        return None
    (claim,) = claims
    usage = Usage(prompt_tokens=4, completion_tokens=tokens)
    ids = tuple(range(tokens))
    end = Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=0,
        token_ids=ids,
        finish_reason="stop",
        usage=usage,
    )
    queue.finish([end])
    return claim


def clients(url: str, *tenants: str) -> list[Client]:
    return [Client(url, tenant=tenant) for tenant in tenants]


def test_tenants_share_tokens_by_weight(
    server_url: str, server: redis.Redis, make_queue: MakeQueue
) -> None:
    server.hset(KEYS.settings, "weight:heavy", 3)
    queue = make_queue()
    for client in clients(server_url, "light", "heavy"):
        client.submit_many(client.new_request("x" * 12, max_tokens=60) for _ in range(200))
        client.close()
    served = Counter(claim.request.tenant for _ in range(160) if (claim := serve(queue)))
    assert served["heavy"] / served["light"] == pytest.approx(3, rel=0.1)


def test_what_was_not_generated_is_not_charged(
    server_url: str, server: redis.Redis, make_queue: MakeQueue
) -> None:
    """Both take 10 tokens a request; one of them asks for up to 1,000 each time."""
    modest, grand = clients(server_url, "modest", "grand")
    modest.submit_many(modest.new_request("x" * 12, max_tokens=10) for _ in range(60))
    grand.submit_many(grand.new_request("x" * 12, max_tokens=1000) for _ in range(60))
    queue = make_queue()
    served = Counter(claim.request.tenant for _ in range(80) if (claim := serve(queue, 10)))
    assert served["grand"] == pytest.approx(served["modest"], rel=0.1)


def test_one_request_does_not_wait_behind_ten_thousand(
    server_url: str, make_queue: MakeQueue
) -> None:
    bulk, single = clients(server_url, "bulk", "single")
    bulk.submit_many(bulk.new_request("x", max_tokens=60) for _ in range(10_000))
    queue = make_queue()
    for _ in range(5):
        serve(queue)
    single.submit("x", max_tokens=60)
    tenants = [claim.request.tenant for _ in range(2) if (claim := serve(queue))]
    assert "single" in tenants


def test_low_priority_advances_under_constant_high_load(
    client: Client, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    low = [client.submit("x" * 12, max_tokens=60, priority=2) for _ in range(30)]
    served = []
    for _ in range(340):
        client.submit("x" * 12, max_tokens=60, priority=0)
        claim = serve(queue)
        assert claim is not None
        served.append(claim.request_id)
    share = len(set(low) & set(served)) / len(served)
    assert share == pytest.approx(1 / 17, rel=0.1)  # one token for every 16 of its betters


def test_a_low_priority_that_does_not_wait_gains_no_credit(
    client: Client, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    for _ in range(40):
        client.submit("x", max_tokens=60, priority=0)
        serve(queue)
    client.submit("x", max_tokens=60, priority=2)
    high = client.submit("x", max_tokens=60, priority=0)
    claim = serve(queue)
    assert claim is not None
    assert claim.request_id == high


def test_a_quota_bounds_one_tenant_and_frees_with_each_end(
    server_url: str, server: redis.Redis, make_queue: MakeQueue
) -> None:
    server.hset(KEYS.settings, "quota:small", 2)
    small, other = clients(server_url, "small", "other")
    small.submit("a"), small.submit("b")
    with pytest.raises(Busy, match="quota of tenant small") as caught:
        small.submit("c")
    assert 1 <= caught.value.retry_after_s <= 2
    other.submit("d")
    queue = make_queue()
    serve(queue), serve(queue)
    small.submit("c")
    while serve(queue):
        pass
    assert not server.exists(KEYS.tenants)


def test_map_waits_for_a_quota_by_itself(
    server_url: str, server: redis.Redis, echo_worker: None
) -> None:
    server.hset(KEYS.settings, "quota:small", 2)
    with Client(server_url, tenant="small") as small:
        texts = [result.text for result in small.map(["a", "b", "c", "d"], ordered=True)]
    assert texts == ["a", "b", "c", "d"]


def test_a_paused_queue_gives_nothing_and_goes_on_with_what_runs(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    client.submit("a"), client.submit("b")
    (running,) = queue.claim(**ONE)
    server.hset(KEYS.settings, "paused", 1)
    assert queue.claim(**ONE) == []
    usage = Usage(prompt_tokens=1, completion_tokens=0)
    end = Finish(
        request_id=running.request_id,
        epoch=running.epoch,
        start=0,
        finish_reason="stop",
        usage=usage,
    )
    queue.finish([end])
    assert queue.claim(**ONE) == []
    server.hdel(KEYS.settings, "paused")
    assert len(queue.claim(**ONE)) == 1


def test_no_index_is_left(server_url: str, server: redis.Redis, make_queue: MakeQueue) -> None:
    queue = make_queue()
    for tenant in ("a", "b"):
        with Client(server_url, tenant=tenant) as client:
            for priority in (0, 1, 2):
                client.submit("x", priority=priority, max_tokens=60)
    while serve(queue):
        pass
    queue.claim(**ONE)
    names = (key.decode().removeprefix(KEYS.tag + ":") for key in server.scan_iter())
    assert {name.partition(":")[0] for name in names} <= {"r", "o", "ctl", "workers", "w"}
