"""A request that goes on elsewhere gives the same tokens and text: sampled, penalised, stopped."""

from typing import Any

import pytest

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel
from tokenmill.producer.params import SamplingParams

SAMPLING: dict[str, Any] = {
    "max_tokens": 14,
    "temperature": 1.2,
    "top_p": 0.95,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {28: 1.5, 30: 1.0},
    "seed": 3,
}


@pytest.fixture(scope="module")
def engine(smollm2: LoadedModel) -> Engine:
    return Engine(smollm2, EngineConfig(token_budget=64))


def go_on(engine: Engine, done: list[int], stop: tuple[str, ...] = ()) -> tuple[list[int], str]:
    """All tokens and the whole text of a request of which `done` is committed, up to its stop."""
    params = SamplingParams(**SAMPLING, stop=stop)
    prompt = engine.tokenizer.encode("The little boat sailed out and")
    detokenizer = Detokenizer(engine.tokenizer, stop)
    text = detokenizer.feed(done)
    tokens = list(done)
    engine.add("a", prompt, params, output_ids=done, seed=3)
    while engine.has_work:
        for output in engine.step():
            before = detokenizer.num_tokens
            text += detokenizer.feed(output.token_ids)
            tokens += output.token_ids[: detokenizer.num_tokens - before]
            if detokenizer.stopped:
                engine.abort("a")
            elif output.finish_reason is not None:
                text += detokenizer.finish()
    return tokens, text


def test_a_stop_string_across_the_resume(engine: Engine) -> None:
    """The stop string begins in the last committed token and ends in the first new one."""
    tokens, text = go_on(engine, [])
    assert len(tokens) == 14
    done = 9
    before, after = (engine.tokenizer.decode(tokens[:size]) for size in (done, done + 1))
    stop = (before[-2:] + after[len(before) :][:2],)
    assert text.find(stop[0]) == len(before) - 2  # it stands nowhere earlier
    whole = go_on(engine, [], stop)
    assert whole == (tokens[: done + 1], text[: len(before) - 2])
    for size in (3, done):
        assert go_on(engine, tokens[:size], stop) == whole
