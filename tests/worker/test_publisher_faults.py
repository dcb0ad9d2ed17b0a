"""What the publisher does when the server refuses, forgets, or does not answer."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ResponseError

from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.params import SamplingParams
from tokenmill.worker import outage as outage_module
from tokenmill.worker import publisher as publisher_module
from written import entries, state

pytestmark = pytest.mark.placed("")

KEYS = Keys()
MakeParts = Callable[..., Any]
OutputOf = Callable[[str], Any]


def test_a_fenced_request_is_dropped_without_a_word(
    client: Client, make_parts: MakeParts, server: redis.Redis, output_of: OutputOf
) -> None:
    first, second = make_parts("w1"), make_parts("w2")
    request_id = client.submit("abc", max_tokens=8)
    first.claim()
    first.step(3)
    server.zadd(KEYS.workers, {"w1": 1})
    second.queue.reap()
    second.claim()
    second.step(1)
    first.step(2)
    assert not first.engine.has_work
    assert first.publisher.num_dropped == 1
    second.step(5)
    result = output_of(request_id)
    assert [token % 16 for token in result.token_ids] == [1] * 3 + [3] * 5  # who wrote which


def test_a_gap_is_released_for_whoever_goes_on_from_the_servers_offset(
    client: Client, make_parts: MakeParts, server: redis.Redis
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=20)
    parts.claim()
    parts.step(5)
    # A failover rolled the server back to two tokens.
    for key, _, _ in entries(server, request_id)[2:]:
        server.xdel(KEYS.output(request_id), key)
    server.hset(KEYS.record(request_id), "offset", 2)
    parts.step(2)
    assert not parts.engine.has_work
    assert state(server, request_id) == "park"
    assert server.hget(KEYS.record(request_id), "attempts") == b"0"
    assert [claim.token_ids for claim in parts.queue.claim(sequences=1, tokens=9, kv_tokens=9999)]


def test_a_lost_answer_is_asked_for_again_with_the_same_pieces(
    client: Client,
    make_parts: MakeParts,
    spied_queue: Any,
    output_of: OutputOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outage_module, "BACKOFF_S", (0.0, 0.0))
    parts = make_parts(queue=spied_queue)
    request_id = client.submit("abc", max_tokens=6)
    parts.claim()
    lost = RedisConnectionError("gone")
    for is_after in (True, False, True):
        spied_queue.faults = [(lost, is_after), (lost, not is_after)]
        spied_queue.calls.clear()
        parts.step()
        pieces = [p for name, p in spied_queue.calls if name == "append" and p[0].token_ids]
        assert len(pieces) == 3
        assert pieces[0] == pieces[1] == pieces[2]
        assert not parts.outage.is_on
    spied_queue.faults = []
    parts.step(2)
    spied_queue.faults = [(lost, True), (lost, False)]
    parts.step()
    result = output_of(request_id)
    assert len(result.token_ids) == 6
    assert result.finish_reason == "length"


def test_tokens_wait_for_the_server_up_to_a_bound(
    make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_BACKLOG", 3)
    parts = make_parts()
    parts.engine.add(
        "s#1", (1,), SamplingParams(max_tokens=1000), output_ids=(), seed=1, priority=1
    )
    for _ in range(5):
        parts.loop.turn()
    assert parts.publisher.is_full
    assert len(parts.engine.sequences["s#1"].output) == 3  # the loop stood still
    parts.publisher.turn()
    started = time.monotonic()
    parts.inbox.take(20.0)  # what the loop sleeps in: it was woken
    assert time.monotonic() - started < 10.0
    parts.loop.turn()
    assert len(parts.engine.sequences["s#1"].output) == 4


def test_without_life_in_the_engine_the_lease_is_not_renewed(
    client: Client, make_parts: MakeParts, spied_queue: Any
) -> None:
    parts = make_parts(queue=spied_queue)
    client.submit("abc", max_tokens=100)
    parts.claim()
    parts.publisher.turn()
    spied_queue.calls.clear()
    parts.alive = False
    parts.clock.sleep(5.0)
    parts.publisher.turn()
    assert spied_queue.calls == []
    parts.alive = True
    parts.clock.sleep(5.0)
    parts.publisher.turn()
    assert [name for name, _ in spied_queue.calls] == ["append"]


@pytest.mark.parametrize("damaged", [KEYS.output, KEYS.record])
def test_a_request_that_cannot_be_written_fails_alone(
    client: Client,
    make_parts: MakeParts,
    server: redis.Redis,
    output_of: OutputOf,
    damaged: Callable[[str], str],
) -> None:
    bad, good = client.submit("bad", max_tokens=9), client.submit("good", max_tokens=9)
    parts = make_parts()
    parts.claim()
    parts.step(2)
    server.delete(damaged(bad))
    server.set(damaged(bad), "of another type")
    parts.step(3)
    assert not parts.outage.is_on
    assert list(parts.engine.sequences) == [f"{good}#1"]
    assert parts.publisher.num_held == 1
    parts.step(6)
    assert output_of(good).ok
    if damaged(bad) == KEYS.output(bad):
        reason: Any = server.hget(KEYS.record(bad), "reason")
        assert b"a write was refused: ResponseError: WRONGTYPE" in reason
        server.zadd(KEYS.park, {bad: 0})
    assert parts.queue.claim(sequences=9, tokens=99, kv_tokens=9999) == []
    if damaged(bad) == KEYS.output(bad):
        assert server.hget(KEYS.record(bad), "finish") == b"error"
    else:
        server.zadd(KEYS.live, {bad: 1})
        parts.queue.reap()
    assert server.zcard(KEYS.live) == 0


@pytest.mark.parametrize("text", ["MISCONF Errors writing to the AOF file", "BUSY a script runs"])
def test_what_the_server_says_of_itself_is_waited_for(
    client: Client,
    make_parts: MakeParts,
    spied_queue: Any,
    output_of: OutputOf,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    monkeypatch.setattr(outage_module, "BACKOFF_S", (0.0, 0.0))
    parts = make_parts(queue=spied_queue)
    request_id = client.submit("abc", max_tokens=2)
    parts.claim()
    spied_queue.faults = [(ResponseError(text), False), (OutOfMemoryError("full"), False)]
    parts.step(2)
    assert output_of(request_id).ok


def test_a_release_that_is_refused_drops_the_request(
    client: Client, make_parts: MakeParts, spied_queue: Any
) -> None:
    parts = make_parts(queue=spied_queue)
    client.submit("abc", max_tokens=9)
    parts.claim()
    parts.publisher.turn()
    spied_queue.faults = [(ResponseError("no"), False)]
    parts.publisher.drain()
    parts.publisher.run()
    assert (parts.publisher.num_held, parts.publisher.num_dropped) == (0, 1)


def test_an_append_finishes_only_what_is_still_held(
    client: Client, make_parts: MakeParts, server: redis.Redis
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=9)
    parts.claim()
    parts.publisher.turn()
    server.hset(KEYS.record(request_id), "epoch", 7)  # fenced
    output = parts.publisher._outputs[f"{request_id}#1"]
    output.feed((1,))
    output.end("stop")
    parts.publisher._append([output])
    assert (parts.publisher.num_held, parts.publisher.num_dropped) == (0, 1)
