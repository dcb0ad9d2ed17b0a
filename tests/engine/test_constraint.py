"""Constrained output: masks, ends, resumes, refusals by name, and real JSON from the real model."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.constraint import Constraint, ConstraintCompiler
from tokenmill.engine.engine import Engine, StepOutput
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(smollm2: LoadedModel) -> Engine:
    return Engine(smollm2, EngineConfig(token_budget=256))


@pytest.fixture(scope="module")
def compiler(smollm2: LoadedModel) -> ConstraintCompiler:
    tokenizer = smollm2.tokenizer
    return ConstraintCompiler(
        tokenizer.to_json,
        vocab_size=smollm2.spec.vocab_size,
        eos_token_ids=tokenizer.eos_token_ids,
    )


def run_all(
    engine: Engine,
    prompt: str,
    samplings: list[dict[str, Any]],
    done: list[list[int]] | None = None,
) -> list[tuple[list[int], StepOutput]]:
    """In one batch: the new tokens of each sequence, and what ended it."""
    prompt_ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    try:
        for number, sampling in enumerate(samplings):
            params = SamplingParams(**sampling)
            output_ids = done[number] if done else ()
            seed = params.seed or 0
            engine.add(str(number), prompt_ids, params, output_ids=output_ids, seed=seed)
        tokens: list[list[int]] = [[] for _ in samplings]
        ends: dict[int, StepOutput] = {}
        while engine.has_work:
            for output in engine.step():
                number = int(output.seq_id)
                tokens[number] += output.token_ids
                if output.finish_reason is not None:
                    ends[number] = output
    finally:
        for number in range(len(samplings)):
            engine.abort(str(number))
    engine.check_integrity()
    return [(tokens[number], ends[number]) for number in range(len(samplings))]


def run(
    engine: Engine, prompt: str, output_ids: list[int] | None = None, **sampling: Any
) -> tuple[list[int], StepOutput]:
    """The new tokens of one sequence, and what ended it."""
    return run_all(engine, prompt, [sampling], [output_ids or []])[0]


def text(engine: Engine, tokens: list[int]) -> str:
    return engine.tokenizer.decode(tokens)


def test_json_follows_its_schema(engine: Engine) -> None:
    sampling = {"json_schema": PERSON, "max_tokens": 100}
    samplings = [sampling | {"temperature": t, "seed": 3} for t in (0.0, 1.0, 2.0)]
    for tokens, end in run_all(engine, "Describe a person.", samplings):
        assert end.finish_reason is FinishReason.STOP
        person = json.loads(text(engine, tokens))
        assert list(person) == ["name", "age", "tags"]
        assert isinstance(person["name"], str)
        assert len(person["name"]) <= 12
        assert 0 <= person["age"] <= 120
        assert len(person["tags"]) <= 3
        assert set(person["tags"]) <= {"a", "b", None}


def test_a_regex_is_matched_as_a_whole(engine: Engine) -> None:
    pattern = r"(19|20)\d{2}-\d{2}"
    samplings = [{"regex": pattern, "temperature": 1.0, "seed": seed} for seed in range(4)]
    for tokens, end in run_all(engine, "When?", samplings):
        assert re.fullmatch(pattern, text(engine, tokens))
        assert end.finish_reason is FinishReason.STOP


def test_a_choice_is_one_of_the_texts(engine: Engine) -> None:
    choice = ("yes", "no way\n", '"naïve" \\ /x/ 日本 🙂')
    alone = run_all(engine, "Well?", [{"choice": [only]} for only in choice])
    for only, (tokens, end) in zip(choice, alone, strict=True):
        assert (text(engine, tokens), end.finish_reason) == (only, FinishReason.STOP)
    samplings = [{"choice": choice, "temperature": 5.0, "seed": seed} for seed in range(8)]
    got = {text(engine, tokens) for tokens, _ in run_all(engine, "Well?", samplings)}
    assert got <= set(choice)
    assert len(got) > 1


def test_a_text_that_may_go_on_ends_by_the_end_token(engine: Engine) -> None:
    """After "a" both "a" and the end are allowed: a bias brings the end, min_tokens holds it."""
    (eos,) = engine.tokenizer.eos_token_ids
    sampling: dict[str, Any] = {"regex": "a+", "logit_bias": {eos: 100}, "max_tokens": 30}
    tokens, end = run(engine, "Well?", **sampling)
    assert set(text(engine, tokens)) == {"a"}
    assert (len(tokens), end.finish_reason) == (1, FinishReason.STOP)
    tokens, _ = run(engine, "Well?", min_tokens=5, **sampling)
    assert len(tokens) == 5


def test_a_constraint_goes_before_min_tokens_and_stop_tokens(engine: Engine) -> None:
    """Nothing but a forbidden token is allowed: the constraint is kept all the same."""
    tokens, end = run(engine, "Well?", choice=["yes"], min_tokens=9, stop_token_ids=[11149])
    assert (text(engine, tokens), end.finish_reason) == ("yes", FinishReason.STOP)


def test_logprobs_are_of_the_model_and_not_of_the_mask(engine: Engine) -> None:
    engine.add("a", [5, 6], SamplingParams(choice=("yes", "no"), logprobs=2), seed=0)
    (output,) = engine.step()
    (told,) = output.logprobs
    assert told.logprob < told.top[0][1]
    engine.abort("a")


def test_a_resumed_constraint_goes_on(engine: Engine) -> None:
    sampling: dict[str, Any] = {"json_schema": PERSON, "temperature": 1.0, "seed": 4}
    sampling["repetition_penalty"] = 1.1
    whole, _ = run(engine, "Describe a person.", **sampling)
    done = [whole[:size] for size in (1, 7, len(whole) - 1)]
    resumed = run_all(engine, "Describe a person.", [sampling] * 3, done)
    assert [kept + tokens for kept, (tokens, _) in zip(done, resumed, strict=True)] == [whole] * 3


def test_an_output_that_is_complete_already_ends_without_a_step(engine: Engine) -> None:
    whole, _ = run(engine, "Well?", choice=["yes", "no"])
    tokens, end = run(engine, "Well?", whole, choice=["yes", "no"])
    assert (tokens, end.finish_reason) == ([], FinishReason.STOP)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"json_schema": {"type": "objekt"}}, "json_schema must be .*an invalid JSON schema"),
        ({"json_schema": {"not": {}}}, r"json_schema must be .*unsupported keywords not$"),
        ({"json_schema": {"$ref": "http://x.org/a"}}, "json_schema must be a JSON schema that can"),
        (
            {"json_schema": {"$ref": "#/$defs/x"}},
            "json_schema must be .*leads nowhere in the schema",
        ),
        ({"regex": "(a"}, "regex must be a regular expression that can be compiled"),
        ({"regex": "(" * 2000}, "regex must be a regular expression"),
    ],
    ids=["type", "unimplemented", "remote", "dangling", "regex", "deep regex"],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    engine: Engine, sampling: dict[str, Any], message: str
) -> None:
    tokens, end = run(engine, "x", **sampling)
    assert (tokens, end.finish_reason) == ([], FinishReason.ERROR)
    assert re.match(message, end.error)
    with pytest.raises(InvalidRequest, match=message):
        engine.compile(SamplingParams(**sampling))
    assert not engine.has_work


EXPENSIVE: dict[str, dict[str, Any]] = {
    "counted": {"regex": "((a{1,900}b{1,900}){1,900}c{1,900}){1,900}"},
    "alternatives": {"regex": "|".join(f".*{n}.*{n + 1}.*" for n in range(300))},
    "nested": {"regex": "(" * 900 + "a" + "+)" * 900},
    "properties": {
        "json_schema": {"properties": {f"p{n}": {"type": "string"} for n in range(2000)}}
    },
    "patterns": {
        "json_schema": {
            "anyOf": [{"type": "string", "pattern": f"^.*{n}.*x{{{n}}}.*$"} for n in range(1, 400)]
        }
    },
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_what_is_expensive_is_refused_or_stays_cheap(
    compiler: ConstraintCompiler, smollm2: LoadedModel, name: str
) -> None:
    """Bounded by steps of the library; here by wide seconds of this process."""
    began = time.process_time()
    with contextlib.suppress(InvalidRequest):
        constraint = compiler.compile(SamplingParams(**EXPENSIVE[name]))
        assert constraint is not None
        for _ in range(20):
            constraint.allowed()
            constraint.accept(smollm2.tokenizer.encode("a"))
    assert time.process_time() - began < 3


def test_steps_go_on_while_a_constraint_is_compiled(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes for ever holds up its own sequence alone, and can be aborted."""
    is_done = threading.Event()
    compile_it = ConstraintCompiler.compile

    def slow(self: ConstraintCompiler, params: SamplingParams, ids: Sequence[int] = ()) -> Any:
        assert is_done.wait(60)
        return compile_it(self, params, ids)

    monkeypatch.setattr(ConstraintCompiler, "compile", slow)
    try:
        for name in ("slow", "left"):
            engine.add(name, [5, 6], SamplingParams(choice=("yes",)), seed=0)
        engine.add("free", [5, 6], SamplingParams(max_tokens=3, ignore_eos=True), seed=0)
        assert [[o.seq_id for o in engine.step()] for _ in range(3)] == [["free"]] * 3
        engine.abort("left")
    finally:
        is_done.set()
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    assert {output.seq_id for output in outputs} == {"slow"}
    assert outputs[-1].finish_reason is FinishReason.STOP
    engine.check_integrity()


def test_a_constraint_that_reaches_a_limit_ends_its_sequence_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add("bad", [5, 6], SamplingParams(regex="[a-z ]+"), seed=0)
    engine.add("good", [5, 6], SamplingParams(max_tokens=3, ignore_eos=True), seed=0)
    monkeypatch.setattr(Constraint, "accept", lambda self, ids: False)
    ends: dict[str, StepOutput] = {}
    while engine.has_work:
        ends |= {output.seq_id: output for output in engine.step()}
    assert ends["bad"].finish_reason is FinishReason.ERROR
    assert ends["bad"].error.startswith("regex must be less costly")
    assert ends["good"].finish_reason is FinishReason.LENGTH
    engine.check_integrity()


@pytest.mark.parametrize(
    ("schema", "text", "is_allowed"),
    [
        ({"format": "time"}, "11:22:33.123456789+01:00", True),
        ({"format": "time"}, "11:22:33.12345678900000000000", False),
        ({"anyOf": [{"format": "date-time"}]}, "2026-01-02T11:22:33.123456789+01:00", True),
        ({"anyOf": [{"format": "date-time"}]}, "2026-01-02T11:22:33.1234567890000000000", False),
        ({"format": "time", "maxLength": 60}, "11:22:33.12345678900000000000Z", True),
    ],
)
def test_a_time_comes_to_an_end(
    compiler: ConstraintCompiler,
    smollm2: LoadedModel,
    schema: dict[str, Any],
    text: str,
    is_allowed: bool,
) -> None:
    """A small model writes digits for ever where it may."""
    params = SamplingParams(json_schema=json.dumps({"type": "string", **schema}))
    constraint = compiler.compile(params)
    assert constraint is not None
    assert constraint.accept(smollm2.tokenizer.encode(json.dumps(text))) is is_allowed


def test_values_that_look_like_schemas_stay_as_they_are(
    compiler: ConstraintCompiler, smollm2: LoadedModel
) -> None:
    value = {"format": "time"}
    constraint = compiler.compile(SamplingParams(json_schema=json.dumps({"const": value})))
    assert constraint is not None
    assert constraint.accept(smollm2.tokenizer.encode(json.dumps(value)))
    assert constraint.is_complete


def test_a_closed_compiler_leaves_what_was_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter waits for its threads, and so for what they have still to do."""
    has_begun, may_end = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        has_begun.set()
        assert may_end.wait(60)

    monkeypatch.setattr(ConstraintCompiler, "compile", slow)
    compiler = ConstraintCompiler(lambda: "{}", vocab_size=9, eos_token_ids=[0])
    futures = [compiler.submit(SamplingParams(choice=("a",))) for _ in range(30)]
    assert has_begun.wait(60)
    compiler.close()
    assert [future.cancelled() for future in futures] == [False] + [True] * 29
    may_end.set()
    assert futures[0].result(60) is None


def test_a_model_whose_tokenizer_is_of_no_use_says_so() -> None:
    compiler = ConstraintCompiler(lambda: "{}", vocab_size=9, eos_token_ids=[0])
    with pytest.raises(InvalidRequest, match="choice must be not given: this model's tokenizer"):
        compiler.compile(SamplingParams(choice=("a",)))
