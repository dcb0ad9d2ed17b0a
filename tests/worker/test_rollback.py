"""A server that forgot its last moments: a failover to a stale replica, or a crash between syncs.

What it forgets, it forgets as a whole: `forgotten` brings back an earlier state of all keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.logprobs import TokenLogprobs, pack_logprobs
from tokenmill.producer.operator import Operator
from tokenmill.producer.wire import Usage
from tokenmill.worker import intake
from tokenmill.worker import queue as queue_module
from tokenmill.worker.plain_inbox import BATCH
from tokenmill.worker.queue import Finish, Queue, Verdict
from writes import end, piece

MakeQueue = Callable[..., Queue]
MakeParts = Callable[..., Any]
KEYS = Keys()
AMPLE: dict[str, Any] = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}


@contextmanager
def forgotten(server: redis.Redis) -> Iterator[None]:
    """What happens inside never happened."""
    kept: dict[bytes, Any] = {key: server.dump(key) for key in server.scan_iter()}
    yield
    server.flushdb()
    for key, value in kept.items():
        server.restore(key, 0, value)


def test_a_forgotten_end_runs_again(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    client.submit("x")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    with forgotten(server):
        queue.finish([end(claim, 0, 1)])
    assert queue.disown([]) == 0  # it might be a claim on its way
    assert queue.disown([claim.request_id]) == 0  # it is
    assert (queue.disown([]), queue.disown([])) == (0, 1)
    (again,) = queue.claim(**AMPLE)
    assert (again.request_id, again.attempts) == (claim.request_id, 1)


def test_another_worker_under_the_same_epoch_fences_the_first(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    client.submit("x")
    first, second = make_queue("w1"), make_queue("w2")
    with forgotten(server):
        (claim,) = first.claim(**AMPLE)
    (other,) = second.claim(**AMPLE)
    assert other.epoch == claim.epoch
    assert first.append([piece(claim, 0, 1)]) == [Verdict.FENCED]
    assert first.release(claim.request_id, claim.epoch, undo=True) is Verdict.FENCED
    assert first.finish([end(claim, 0, 1)]) == [Verdict.FENCED]
    assert second.append([piece(other, 0, 2)]) == [Verdict.OK]
    assert second.finish([end(other, 1)]) == [Verdict.OK]
    assert first.finish([end(claim, 0, 1)]) == [Verdict.FENCED]


def test_a_worker_that_is_given_its_own_claim_again_starts_over(
    client: Client,
    server: redis.Redis,
    make_parts: MakeParts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "BUSY_WAIT_S", 0.001)
    parts = make_parts()
    request_id = client.submit("hello", max_tokens=20)
    with forgotten(server):
        parts.claim()
        parts.step(3)
    while server.zcard(KEYS.live):
        parts.claim()
        parts.step()
    result = client.result(request_id, timeout_s=5)
    assert (result.finish_reason, len(result.token_ids)) == ("length", 20)


def test_upkeep_gives_back_what_the_server_alone_remembers(
    client: Client, server: redis.Redis, make_parts: MakeParts
) -> None:
    parts = make_parts()
    request_id = client.submit("hello", max_tokens=3)
    parts.claim()
    with forgotten(server):
        parts.step(5)
        assert client.result(request_id, timeout_s=5).ok
    assert server.zcard(KEYS.live)
    while server.zcard(KEYS.live):
        parts.clock.sleep(5)
        parts.intake._keep_up()
        parts.step()
        if server.zcard(KEYS.park):
            parts.claim()
    assert client.result(request_id, timeout_s=5).ok


def test_a_repeated_empty_claim_does_not_lose_the_wake_up(
    client: Client, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    queue.claim(**AMPLE)
    queue._claim_seq -= 1  # its answer was lost
    request_id = client.submit("x")
    assert [claim.request_id for claim in queue.claim(**AMPLE)] == [request_id]


def test_charges_of_a_forgotten_lane_are_no_credit(
    server_url: str, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    with Client(server_url, tenant="a") as a, Client(server_url, tenant="b") as b:
        a.submit_many(a.new_request("x", max_tokens=4096) for _ in range(8))
        running = queue.claim(**AMPLE)
        queue.claim(**AMPLE)  # forgets the empty lane
        b.submit("x", max_tokens=60)
        a.submit_many(a.new_request("x", max_tokens=60) for _ in range(20))
        queue.finish([end(claim, 0, 1) for claim in running])
        one: dict[str, Any] = {**AMPLE, "sequences": 1}
        tenants = [queue.claim(**one)[0].request.tenant for _ in range(3)]
    assert "b" in tenants


def test_a_drained_request_that_is_cancelled_gives_its_charge_back(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    request_id = client.submit("x", max_tokens=100)
    client.submit("y", max_tokens=1)
    (claim,) = queue.claim(**AMPLE, limit=1)
    before = server.zscore(KEYS.lanes(1), "default")
    queue.release(request_id, claim.epoch, undo=True)
    client.cancel(request_id)
    after = server.zscore(KEYS.lanes(1), "default")
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert after == before - 100


def test_dead_letters_end_with_their_time(
    client: Client, server: redis.Redis, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, queue = Operator(server, KEYS), make_queue()
    operator.configure(dead_ttl_s=0.05)
    client.submit("x")
    (claim,) = queue.claim(**AMPLE)
    usage = Usage(prompt_tokens=0, completion_tokens=0)
    bad = Finish(request_id=claim.request_id, epoch=1, start=0, finish_reason="error", usage=usage)
    queue.finish([bad])
    assert operator.status().dead == 1
    while server.exists(KEYS.record(claim.request_id)):
        pass
    queue.reap()
    assert operator.status().dead == 0


def test_a_damaged_reply_stream_stops_nobody(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    server.set(KEYS.reply("mine"), "?")
    ids = [client.submit("x", reply_to=name, deadline_s=0.02) for name in ("mine", "yours")]
    queue = make_queue()
    while server.zcard(KEYS.live):
        queue.reap()
    assert all(client.result(request_id).finish_reason == "expired" for request_id in ids)


def test_counts_of_lost_records_go_with_the_last(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x", deadline_s=0.02)
    server.delete(KEYS.record(request_id))
    queue = make_queue()
    while server.zcard(KEYS.live):
        queue.reap()
    assert not server.exists(KEYS.tenants)


def test_log_probabilities_survive_a_compaction(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    """Also of an output that was parked and went on, for who follows it and who wants it whole."""
    request_id = client.submit("x", logprobs=0)
    rows = [TokenLogprobs(token_id, -token_id / 4) for token_id in (1, 2, 3)]
    packed = [pack_logprobs([row]) for row in rows]
    first, second = make_queue("w1"), make_queue("w2")
    (claim,) = first.claim(**AMPLE)
    first.append([replace(piece(claim, 0, 1), logprobs=packed[0])])
    first.release(request_id, claim.epoch, undo=True)
    (claim,) = second.claim(**AMPLE)
    assert claim.token_ids == (1,)
    second.append([replace(piece(claim, 1, 2), logprobs=packed[1])])
    second.finish([replace(end(claim, 2, 3, before=(2,)), logprobs=packed[2])])
    before = client.result(request_id)
    assert before.logprobs == tuple(rows)
    assert Operator(server, KEYS).compact([request_id]) == 1
    assert client.result(request_id) == before
    (whole,) = client.follow(request_id)
    assert (whole.token_ids, whole.logprobs) == ((1, 2, 3), tuple(rows))


def test_they_survive_it_where_the_end_had_none(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x", logprobs=0)
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    row = TokenLogprobs(1, -0.25)
    queue.append([replace(piece(claim, 0, 1), logprobs=pack_logprobs([row]))])
    queue.finish([end(claim, 1)])
    assert Operator(server, KEYS).compact([request_id]) == 1
    assert client.result(request_id).logprobs == (row,)


def test_the_oldest_dead_letter_makes_room_and_is_not_kept_unlisted(
    client: Client, server: redis.Redis, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = queue_module._FINISH
    assert script.source.count("local DEAD_KEPT = 10000") == 1
    monkeypatch.setattr(script, "source", script.source.replace("KEPT = 10000", "KEPT = 3"))
    monkeypatch.setattr(script, "_sha", "")
    queue, ids = make_queue(), []
    for _ in range(5):
        ids.append(client.submit("x"))
        (claim,) = queue.claim(**AMPLE)
        queue.finish([end(claim, 0, reason="error")])
    listed = [letter.request_id for letter in Operator(server, KEYS).dead()]
    assert set(listed) < set(ids)
    assert listed[0] == ids[-1]
    assert len(listed) <= 3
    for request_id in ids:
        assert server.hexists(KEYS.record(request_id), "payload") == (request_id in listed)
        is_short = server.ttl(KEYS.record(request_id)) <= 86_400
        assert is_short == (request_id not in listed)


def test_replies_that_nobody_reads_end_with_their_time(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    for number in range(300):
        server.xadd(KEYS.reply("mine"), {"id": "old"}, id=f"{1 + number}-0")
    client.submit("x", reply_to="mine")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    queue.finish([end(claim, 0, 1)])
    assert int(server.xlen(KEYS.reply("mine"))) <= 101  # whole nodes of 100 are dropped


def test_a_retried_request_that_waits_has_no_charge_to_give_back(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    request_id = client.submit("x", max_tokens=100)
    (claim,) = queue.claim(**AMPLE)
    queue.finish([end(claim, 0, reason="error")])
    client.submit_many(client.new_request("y", max_tokens=4096) for _ in range(2))
    queue.claim(**AMPLE, limit=1)  # so that there is something to take from
    assert Operator(server, KEYS).retry([request_id]) == {request_id: "OK"}
    before = server.zscore(KEYS.lanes(1), "default")
    assert client.cancel(request_id)
    assert server.zscore(KEYS.lanes(1), "default") == before


def test_what_has_ended_and_is_still_indexed_ends_once(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    queue.finish([end(claim, 0, 1)])
    server.zadd(KEYS.live, {request_id: 1})
    queue.reap()
    assert not server.zcard(KEYS.live)
    assert client.result(request_id).finish_reason == "stop"
    assert server.xlen(KEYS.output(request_id)) == 1


def test_a_full_queue_is_not_asked_again_for_the_rest_of_its_inbox(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    Operator(server, KEYS).configure(max_live=1)
    client.submit("x")
    for _ in range(2 * BATCH):
        server.xadd(KEYS.inbox, {"json": '{"prompt": "x"}'})
    queue = make_queue()
    assert queue.admit() == BATCH
    assert queue.admit() == 0
