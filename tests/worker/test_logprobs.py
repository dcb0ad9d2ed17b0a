"""Log probabilities through a real server: streamed, as one reply, cut by a stop, resumed."""

from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.engine.engine import StepOutput
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.logprobs import TokenLogprobs
from tokenmill.worker import intake

MakeParts = Callable[..., Any]


def row(token_id: int) -> TokenLogprobs:
    """Values that float32 holds exactly."""
    return TokenLogprobs(token_id, -token_id / 4, ((token_id, -0.25), (7, -1.5)))


def put(parts: Any, seq_id: str, *token_ids: int, **more: Any) -> None:
    rows = tuple(row(token_id) for token_id in token_ids)
    parts.publisher.put([StepOutput(seq_id, token_ids, logprobs=rows, **more)])
    parts.clock.sleep(1.0)
    parts.publisher.turn()


@pytest.mark.parametrize("reply_to", ["", "mine"], ids=["stream", "reply"])
def test_they_come_with_their_tokens(client: Client, make_parts: MakeParts, reply_to: str) -> None:
    parts = make_parts()
    request_id = client.submit("abc", logprobs=2, prompt_logprobs=0, reply_to=reply_to)
    parts.claim()
    seq_id = f"{request_id}#1"
    prompt = (TokenLogprobs(98, -0.5), TokenLogprobs(99, -2.0))
    for half in (prompt[:1], prompt[1:]):
        parts.publisher.put([StepOutput(seq_id, (), prompt_logprobs=half)])
    for token_id in (65, 66, 67):
        put(parts, seq_id, token_id)
    put(parts, seq_id, 68, finish_reason=FinishReason.LENGTH)
    result = client.result(request_id, timeout_s=5)
    assert result.token_ids == (65, 66, 67, 68)
    assert result.logprobs == tuple(row(token_id) for token_id in result.token_ids)
    assert result.prompt_logprobs == prompt
    if not reply_to:
        deltas = list(client.follow(request_id))
        assert all(len(d.logprobs) == len(d.token_ids) for d in deltas)
        assert deltas[0].prompt_logprobs == prompt


@pytest.mark.parametrize("reply_to", ["", "mine"], ids=["stream", "reply"])
def test_another_worker_goes_on_with_them(
    client: Client, make_parts: MakeParts, reply_to: str
) -> None:
    first, second = make_parts("w1"), make_parts("w2")
    request_id = client.submit("abc", logprobs=2, reply_to=reply_to)
    first.claim()
    put(first, f"{request_id}#1", 65, 66)
    first.publisher.drain()
    first.publisher.run()
    second.claim()
    put(second, f"{request_id}#3", 67, finish_reason=FinishReason.STOP)
    result = client.result(request_id, timeout_s=5)
    assert [told.token_id for told in result.logprobs] == [65, 66, 67]


def test_what_a_stop_string_cuts_off_has_none(client: Client, make_parts: MakeParts) -> None:
    parts = make_parts()
    request_id = client.submit("abc", logprobs=2, stop=["c"])
    parts.claim()
    put(parts, f"{request_id}#1", 16, 32, 48)  # "b", "c", "d"
    result = client.result(request_id, timeout_s=5)
    assert result.text == "b"
    assert [told.token_id for told in result.logprobs] == list(result.token_ids) == [16, 32]


def test_who_does_not_ask_pays_nothing(
    client: Client, make_parts: MakeParts, server: redis.Redis
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=3)
    parts.claim()
    parts.step(4)
    assert client.result(request_id, timeout_s=5).logprobs == ()
    entries: Any = server.xrange(Keys().output(request_id))
    assert not any(b"l" in fields for _, fields in entries)


def test_too_many_of_a_prompt_are_refused(
    client: Client, make_parts: MakeParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MAX_PROMPT_LOGPROBS", 10)
    parts = make_parts()
    ids = [client.submit("abc", prompt_logprobs=top) for top in (2, 3)]
    parts.claim()
    parts.publisher.turn()
    result = client.result(ids[1], timeout_s=5)
    assert result.reason.startswith("prompt_logprobs must be at most 10 values, got 12")
    assert parts.publisher.num_held == 1
