"""Pipeline with the real model: answers, streams, stop strings, refusals without a trace."""

from typing import Any

import pytest

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.pipeline import Pipeline
from tokenmill.producer.errors import InvalidRequest

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def pipeline(smollm2: LoadedModel) -> Pipeline:
    made = Pipeline.__new__(Pipeline)  # the model is loaded once for all tests
    made.engine = Engine(smollm2, EngineConfig(token_budget=256))
    return made


def test_the_capital_of_france(pipeline: Pipeline) -> None:
    answer, again = pipeline([FRANCE, FRANCE], max_tokens=20)
    assert answer.text == "The capital of France is Paris."
    assert (answer.finish_reason, answer.num_prompt_tokens) == ("stop", 37)
    assert again == answer


def test_a_text_goes_in_as_it_is(pipeline: Pipeline) -> None:
    (answer,) = pipeline("The capital of France is", max_tokens=3)
    assert "Paris" in answer.text
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 3)


def test_a_single_prompt_may_be_messages_or_token_ids(pipeline: Pipeline) -> None:
    (chat,) = pipeline(FRANCE, max_tokens=20)
    assert chat.text == "The capital of France is Paris."
    (ids,) = pipeline(pipeline.encode(FRANCE), max_tokens=20)
    assert ids == chat


def test_streamed_pieces_join_to_the_answer(pipeline: Pipeline) -> None:
    pieces = list(pipeline.stream([FRANCE], max_tokens=20))
    assert len(pieces) > 4
    assert "".join(p.text for p in pieces) == "The capital of France is Paris."
    assert [p.finish_reason for p in pieces if p.finish_reason] == ["stop"]


def test_a_stop_string_across_tokens_cuts_the_answer(pipeline: Pipeline) -> None:
    (answer,) = pipeline([FRANCE], max_tokens=20, stop=["nce is"])
    assert (answer.text, answer.finish_reason) == ("The capital of Fra", "stop")
    assert not pipeline.engine.has_work


def test_sampling_with_a_seed_repeats(pipeline: Pipeline) -> None:
    def sampled(seed: int) -> str:
        return pipeline("Once upon a time", max_tokens=12, temperature=1.0, seed=seed)[0].text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_n_answers_are_grouped_by_prompt_and_differ(pipeline: Pipeline) -> None:
    prompts = ["Once upon a time", "The weather"]
    got = pipeline(prompts, n=3, max_tokens=8, temperature=1.0, seed=5)
    assert len(got) == 6
    assert len({answer.text for answer in got[:3]}) == 3
    first, second = (pipeline(p, max_tokens=8, temperature=1.0, seed=5)[0] for p in prompts)
    assert (got[0], got[3]) == (first, second)


def test_logprobs_come_with_the_tokens(pipeline: Pipeline) -> None:
    (answer,) = pipeline([FRANCE], max_tokens=4, logprobs=3, prompt_logprobs=0)
    assert [row.token_id for row in answer.logprobs] == list(answer.token_ids)
    for row in answer.logprobs:
        assert row.top[0] == (row.token_id, row.logprob)  # greedy: the likeliest
        assert len(row.top) == 3
    told = [row.token_id for row in answer.prompt_logprobs]
    assert told == pipeline.encode(FRANCE)[1:]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer from 1 to 1000000, got 0"),
        ({"n": 0}, "n must be an integer from 1 to 128, got 0"),
        ({"temperature": -1}, "temperature must be a number from 0 to 100, got -1"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(
    pipeline: Pipeline, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline("x", **sampling)


def test_a_prompt_too_long_is_refused_and_the_others_are_forgotten(pipeline: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="shorter than the context of 8192 tokens"):
        pipeline(["short", "long " * 9000], max_tokens=4)
    assert not pipeline.engine.has_work
