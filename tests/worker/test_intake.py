"""What is claimed for which capacity, and what becomes of a claim; on a real server, by hand."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tokenmill.engine.capacity import Capacity
from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.params import derived_seed
from tokenmill.worker.intake import Room

pytestmark = pytest.mark.placed("")

KEYS = Keys()
MakeParts = Callable[..., Any]
OutputOf = Callable[[str], Any]


def capacity(*, tokens: int = 4096, blocks: int = 1000, sequences: int = 10) -> Capacity:
    return Capacity(tokens=tokens, blocks=blocks, sequences=sequences, block_size=32)


def test_what_is_held_is_not_offered_twice(client: Client, make_parts: MakeParts) -> None:
    for number in range(9):
        client.submit([1, 2, number], max_tokens=5)
    parts = make_parts()
    parts.intake.offer(capacity(sequences=4))
    parts.intake.turn()
    held = parts.inbox.take().admissions
    assert len(held) == 4
    assert not parts.intake._room()  # the loop has them, but its capacity says nothing of them yet
    parts.intake.offer(capacity(sequences=6), [admission.seq_id for admission in held[:3]])
    assert parts.intake._room() == Room(5, 4096 - 3, 32_000 - 8)
    parts.intake.turn()
    assert len(parts.inbox.take().admissions) == 5


def test_behind_a_window_a_claim_holds_no_more_than_the_window(
    client: Client, make_parts: MakeParts
) -> None:
    for _ in range(3):
        client.submit([7] * 900, max_tokens=5)
    parts = make_parts()
    parts.intake.offer(replace(capacity(blocks=30), kv_tokens_each=320))
    parts.intake.turn()
    assert len(parts.inbox.take().admissions) == 3
    assert not parts.intake._room().kv_tokens


def test_prompt_tokens_bound_a_claim(client: Client, make_parts: MakeParts) -> None:
    for _ in range(5):
        client.submit([7] * 100, max_tokens=5)
    parts = make_parts()
    parts.intake.offer(capacity(tokens=250))
    parts.intake.turn()
    assert len(parts.inbox.take().admissions) == 3  # the third begins in the budget


@pytest.mark.parametrize("lacking", ["tokens", "blocks", "sequences"])
def test_without_room_nothing_is_claimed(
    client: Client, make_parts: MakeParts, lacking: str
) -> None:
    client.submit("abc")
    parts = make_parts()
    parts.intake.offer(capacity(**{lacking: 0}))
    parts.intake._upkeep_at = parts.clock.now
    parts.intake._upkeep_s = 0.01
    parts.intake.turn()
    assert parts.publisher.num_held == 0


def test_prompts_of_every_form_become_token_ids(client: Client, make_parts: MakeParts) -> None:
    parts = make_parts()
    client.submit("hi")
    client.submit([5, 6, 7])
    client.submit([{"role": "user", "content": "hi"}])
    parts.claim()
    admissions = parts.inbox.take().admissions
    assert [a.prompt_ids for a in admissions] == [
        tuple(b"hi"),
        (5, 6, 7),
        tuple(b"<user>hi"),
    ]


def test_the_seed_is_given_or_comes_from_the_id(client: Client, make_parts: MakeParts) -> None:
    given, derived = client.submit("a", seed=17), client.submit("b")
    parts = make_parts()
    parts.claim()
    parts.step()
    assert {name: item.seed for name, item in parts.engine.sequences.items()} == {
        f"{given}#1": 17,
        f"{derived}#1": derived_seed(derived),
    }


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "abc", "model": "other"}, "model must be 'scripted'"),
        ({"prompt": "cannot be tokenized"}, "prompt cannot be tokenized: ValueError"),
        ({"prompt": "x" * 200}, "prompt must be below 100 tokens, got 200"),
    ],
)
def test_a_bad_request_ends_alone(
    client: Client,
    make_parts: MakeParts,
    output_of: OutputOf,
    fields: dict[str, Any],
    reason: str,
) -> None:
    good = client.submit("good", max_tokens=3)
    bad = client.submit(**fields)
    other = client.submit("good too", max_tokens=3)
    parts = make_parts(max_model_len=100)
    parts.claim()
    parts.step(4)
    result = output_of(bad)
    assert result.finish_reason == "error"
    assert reason in result.reason
    assert result.token_ids == ()
    assert output_of(good).ok
    assert output_of(other).ok


def test_a_claim_again_takes_the_place_of_the_earlier_one(
    client: Client, make_parts: MakeParts, server: redis.Redis, output_of: OutputOf
) -> None:
    request_id = client.submit("abc", max_tokens=6)
    parts = make_parts()
    parts.claim()
    parts.step(2)
    server.zadd(KEYS.workers, {"w1": 1})  # its lease ran out unnoticed
    parts.queue.reap()
    parts.claim()
    parts.publisher.turn()
    parts.step(5)
    assert parts.engine.aborted == [f"{request_id}#1"]
    assert [token % 16 for token in output_of(request_id).token_ids] == [1, 1, 3, 3, 3, 3]


def test_upkeep_renews_and_reaps_every_third_of_a_lease(
    make_parts: MakeParts, spied_queue: Any
) -> None:
    parts = make_parts(queue=spied_queue)
    names = []
    for _ in range(20):
        spied_queue.calls.clear()
        parts.intake._keep_up()
        names += [name for name, _ in spied_queue.calls]
        parts.clock.sleep(1.0)
    assert names.count("renew") == names.count("reap")
    assert 4 <= names.count("renew") <= 5  # 20 s of a lease of 15 s


def test_after_an_outage_others_get_time_to_renew_before_they_are_reaped(
    make_parts: MakeParts, spied_queue: Any
) -> None:
    parts = make_parts(queue=spied_queue)
    parts.outage._clock = parts.clock
    parts.outage.lost(RedisConnectionError("gone"))
    parts.intake._keep_up()
    for seconds, may_reap in ((6.0, False), (6.0, False), (6.0, True)):
        spied_queue.calls.clear()
        parts.clock.sleep(seconds)
        parts.intake._keep_up()
        assert ("reap" in [name for name, _ in spied_queue.calls]) is may_reap


def test_a_hung_engine_claims_and_renews_nothing(
    client: Client, make_parts: MakeParts, spied_queue: Any
) -> None:
    client.submit("abc")
    parts = make_parts(queue=spied_queue)
    parts.alive = False
    parts.intake._upkeep_s = 0.01
    parts.claim()
    assert spied_queue.calls == []


def test_idle_for_long_enough_it_stops_the_loop(client: Client, make_parts: MakeParts) -> None:
    client.submit("abc", max_tokens=2)
    parts = make_parts(exit_when_idle_s=0.3)
    parts.claim()
    parts.clock.sleep(10.0)  # busy, not idle
    parts.step(3)
    parts.intake.turn()
    assert not parts.inbox.take().is_stopping
    parts.clock.sleep(0.4)
    parts.intake.turn()
    assert parts.inbox.take().is_stopping


def test_a_parked_request_that_does_not_fit_is_not_claimed_in_a_spin(
    client: Client, make_parts: MakeParts, spied_queue: Any
) -> None:
    client.submit("abc", max_tokens=50)
    parts = make_parts(queue=spied_queue)
    parts.intake.offer(capacity())
    parts.intake.turn()
    parts.publisher.turn()
    big = client.submit([1] * 500, max_tokens=50)
    other = make_parts("w2")
    (claim,) = other.queue.claim(sequences=1, tokens=1, kv_tokens=9999)
    other.queue.release(big, claim.epoch, undo=True)
    admitted = [admission.seq_id for admission in parts.inbox.take().admissions]
    parts.intake.offer(capacity(blocks=2), admitted)
    spied_queue.calls.clear()
    ends_at = time.monotonic() + 0.5
    while time.monotonic() < ends_at:
        parts.intake.turn()
    assert 1 <= [name for name, _ in spied_queue.calls].count("claim") <= 8
