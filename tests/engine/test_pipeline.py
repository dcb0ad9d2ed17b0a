"""Pipeline with the real model: answers, streams, stop strings, refusals without a trace."""

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
    made.engine = Engine(smollm2, EngineConfig())
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


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer from 1 to 1000000, got 0"),
        ({"temperature": -1}, "temperature must be a number from 0 to 100, got -1"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(
    pipeline: Pipeline, sampling: dict[str, float], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline("x", **sampling)


def test_a_prompt_too_long_is_refused_and_the_others_are_forgotten(pipeline: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="shorter than the context of 8192 tokens"):
        pipeline(["short", "long " * 9000], max_tokens=4)
    assert not pipeline.engine.has_work
