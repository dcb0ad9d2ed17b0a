"""The iteration: order of things, failing steps, and the inbox; on a real server, by hand."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import redis

from tokenmill.engine.capacity import Capacity
from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.worker import intake as intake_module
from tokenmill.worker.inbox import Inbox
from tokenmill.worker.loop import MAX_FAILURES, EngineFailed

pytestmark = pytest.mark.placed("")

KEYS = Keys()
MakeParts = Callable[..., Any]
OutputOf = Callable[[str], Any]


def test_a_turn_admits_steps_and_offers_what_is_left(client: Client, make_parts: MakeParts) -> None:
    client.submit("a", max_tokens=9)
    client.submit("b", max_tokens=9)
    parts = make_parts(max_num_seqs=4)
    parts.claim()
    assert parts.loop.turn()
    assert [len(item.output) for item in parts.engine.sequences.values()] == [1, 1]
    assert parts.intake._held == {}
    assert parts.intake._offered.sequences == 4


def test_an_aborted_sequence_is_not_stepped_again(client: Client, make_parts: MakeParts) -> None:
    request_id = client.submit("a", max_tokens=9)
    parts = make_parts()
    parts.claim()
    parts.step()
    parts.inbox.abort(f"{request_id}#1")
    parts.inbox.abort("0.unknown#1")
    parts.step()
    assert parts.engine.aborted == [f"{request_id}#1"]


def test_stop_ends_the_loop_before_the_next_step(client: Client, make_parts: MakeParts) -> None:
    client.submit("a", max_tokens=9)
    parts = make_parts()
    parts.claim()
    parts.step()
    parts.inbox.stop()
    assert not parts.loop.turn()
    assert [len(item.output) for item in parts.engine.sequences.values()] == [1]


def test_a_failing_step_gives_back_what_ran_and_the_worker_goes_on(
    client: Client, make_parts: MakeParts, server: redis.Redis, output_of: OutputOf
) -> None:
    request_id = client.submit("abc", max_tokens=6)
    parts = make_parts()
    parts.claim()
    parts.step(2)
    parts.engine.errors = [RuntimeError("illegal memory access")]
    parts.step()
    record: Any = server.hgetall(KEYS.record(request_id))
    assert (record[b"state"], record[b"offset"], record[b"attempts"]) == (b"park", b"2", b"1")
    assert record[b"reason"] == b"a step failed: RuntimeError: illegal memory access"
    assert not parts.engine.has_work
    later = client.submit("other", max_tokens=3)
    server.zadd(KEYS.park, {request_id: 0})  # its backoff is over
    parts.claim()
    parts.step(5)
    assert output_of(later).ok
    assert [token % 16 for token in output_of(request_id).token_ids] == [1, 1, 3, 3, 3, 3]


def test_a_request_that_fails_every_step_ends_as_an_error(
    client: Client, make_parts: MakeParts, server: redis.Redis, output_of: OutputOf
) -> None:
    request_id = client.submit("poison", max_tokens=6)
    for attempt in range(5):
        parts = make_parts(f"w{attempt}")
        parts.claim()
        parts.engine.errors = [RuntimeError("boom")]
        parts.step()
        server.zadd(KEYS.park, {request_id: 0})
    make_parts("last").queue.claim(sequences=1, tokens=1, kv_tokens=9999)
    result = output_of(request_id)
    assert result.finish_reason == "error"
    assert result.reason == "given up after 5 attempts: a step failed: RuntimeError: boom"


def test_an_engine_that_fails_again_and_again_is_given_up(
    client: Client, make_parts: MakeParts
) -> None:
    parts = make_parts()
    parts.engine.errors = [RuntimeError("broken")] * MAX_FAILURES
    for number in range(MAX_FAILURES):
        client.submit(f"n{number}", max_tokens=6)
        parts.claim()
        if number < MAX_FAILURES - 1:
            parts.step()
    with pytest.raises(EngineFailed, match=r"3 requests in a row failed alone, the last: .*broken"):
        parts.loop.turn()


def run_all(parts: Any, server: redis.Redis) -> None:
    """Turns of intake, loop and publisher until all has ended; every backoff is over at once."""
    for _ in range(500):
        if not server.zcard(KEYS.live):
            break
        for request_id in cast("list[bytes]", server.zrange(KEYS.park, 0, -1)):
            server.zadd(KEYS.park, {request_id: 0}, xx=True)
        parts.intake._upkeep_s = 0.01  # it does not sleep for long
        parts.intake.turn()
        parts.step()


@pytest.mark.parametrize("tokens_before", [0, 1, 5])
def test_one_poison_request_ends_alone(
    client: Client,
    make_parts: MakeParts,
    server: redis.Redis,
    output_of: OutputOf,
    monkeypatch: pytest.MonkeyPatch,
    tokens_before: int,
) -> None:
    monkeypatch.setattr(intake_module, "BUSY_WAIT_S", 0.001)
    innocent = [client.submit(f"n{number}", max_tokens=12) for number in range(4)]
    poison = client.submit("poison", max_tokens=12)
    innocent += [client.submit(f"n{number}", max_tokens=12) for number in range(4, 8)]
    parts = make_parts(poison=(tuple(b"poison"), tokens_before))
    parts.intake.offer(parts.engine.capacity())
    run_all(parts, server)
    assert server.zcard(KEYS.live) == 0
    result = output_of(poison)
    assert result.finish_reason == "error"
    assert result.reason == "given up after 5 attempts: a step failed: RuntimeError: poison"
    assert len(result.token_ids) == tokens_before
    for request_id in innocent:
        assert len(output_of(request_id).token_ids) == 12
        assert server.hget(KEYS.record(request_id), "attempts") == b"1"
    later = [client.submit(f"later {number}", max_tokens=3) for number in range(5)]
    run_all(parts, server)
    assert all(output_of(request_id).ok for request_id in later)
    assert parts.intake._offered.sequences > 1  # no longer on probation


def test_what_was_claimed_before_the_failure_does_not_join_the_lone_one(
    client: Client, make_parts: MakeParts, server: redis.Redis
) -> None:
    for number in range(4):
        client.submit(f"n{number}", max_tokens=50)
    parts = make_parts()
    parts.intake.offer(Capacity(tokens=4096, blocks=999, sequences=2, block_size=32))
    parts.intake.turn()
    parts.loop.turn()
    parts.intake.turn()  # two more, on their way when the step fails
    on_the_way = parts.inbox.take().admissions
    assert len(on_the_way) == 2
    parts.engine.errors = [RuntimeError("boom")]
    parts.step()
    for admission in on_the_way:
        parts.inbox.admit(admission)
    parts.step()
    assert len(parts.engine.sequences) == 1
    assert parts.publisher.num_held == 1
    attempts: list[Any] = [
        server.hget(key, "attempts") for key in server.scan_iter(KEYS.record("*"))
    ]
    assert sorted(attempts) == [b"0", b"0", b"0", b"1"]


def test_the_pulse_beats_every_turn(make_parts: MakeParts) -> None:
    parts = make_parts()
    parts.pulse.beat()
    parts.clock.sleep(61)
    assert not parts.pulse.is_alive
    parts.loop.turn()
    assert parts.pulse.is_alive


def test_the_inbox_returns_everything_once() -> None:
    inbox = Inbox()
    inbox.abort("a")
    inbox.abort("b")
    assert inbox.take(60.0).aborts == ("a", "b")  # does not wait
    assert inbox.take().aborts == ()
    inbox.wake()
    assert not inbox.take(60.0).is_stopping
    inbox.stop()
    assert inbox.take(60.0).is_stopping
    assert inbox.take().is_stopping  # for good
