"""SamplingParams: bounds by name, plain values there and back."""

import json
from typing import Any

import pytest

from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams, choice_seed

NESTED: dict[str, Any] = {}
for _ in range(33):
    NESTED = {"a": NESTED}


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0 and up to 10"),
        ({"presence_penalty": 2.1}, "presence_penalty must be a number from -2 to 2, got 2.1"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be a number from -2 to 2, got '1'"),
        ({"logit_bias": [1]}, "logit_bias must be a map of up to 1024 token ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias must be a map .*, got 'x'"),
        ({"logit_bias": {-1: 1}}, "logit_bias must be a map .*, got -1"),
        ({"logit_bias": {5: 101}}, "logit_bias.5 must be a number from -100 to 100, got 101"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias.5 must be a number"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias must be a map of up to 1024"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20, got 21"),
        ({"logprobs": True}, "logprobs must be an integer from 0 to 20, got True"),
        ({"json_schema": "{"}, "json_schema must be a JSON object of up to 65536 bytes and 32"),
        ({"json_schema": [1]}, "json_schema must be a JSON object"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema must be a JSON object"),
        ({"json_schema": {"a": "x" * 70_000}}, "json_schema must be a JSON object"),
        ({"json_schema": NESTED}, "json_schema must be .*, got 33 levels"),
        ({"json_schema": "[" * 100_000}, "json_schema must be a JSON object"),
        ({"regex": ""}, "regex must be 1 to 4096 characters"),
        (
            {"choice": "yes"},
            "choice must be up to 1024 texts of 1 to 1024 characters, got text of 3",
        ),
        ({"choice": ["yes", ""]}, "choice must be up to 1024 texts"),
        ({"choice": ["a"], "regex": "b"}, "choice must be not given together with regex"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be an integer from 0 to 20, got -1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_out_of_bounds_is_named(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**sampling)


def test_plain_values_there_and_back() -> None:
    bias: dict[Any, float] = {5: 1, "17": -2.5}
    schema: Any = {"b": 1, "a": [2]}
    params = SamplingParams(logit_bias=bias, stop=("a",), json_schema=schema, presence_penalty=-1)
    plain = json.loads(json.dumps(params.to_mapping()))
    assert plain["logit_bias"] == {"5": 1.0, "17": -2.5}
    assert plain["json_schema"] == '{"b": 1, "a": [2]}'
    assert SamplingParams.from_mapping(plain) == params


def test_choices_have_seeds_of_their_own() -> None:
    assert choice_seed(7, 0) == 7
    assert len({choice_seed(seed, choice) for seed in range(20) for choice in range(20)}) >= 399


def test_a_shared_instance_is_checked_by_type_too() -> None:
    assert SamplingParams.from_mapping({"max_tokens": 1}).max_tokens == 1
    for value in (True, 1.0):
        with pytest.raises(InvalidRequest, match="max_tokens"):
            SamplingParams.from_mapping({"max_tokens": value})
