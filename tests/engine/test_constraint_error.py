"""What is told of a constraint that is refused: a category, and nothing of the user's text."""

import sys
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tokenmill.engine import constraint
from tokenmill.engine.constraint import Constraint, ConstraintCompiler
from tokenmill.engine.constraint_error import described
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

CANARY = "PatientJaneDoe"
INVALID_REGEX = "an invalid or unsupported regular expression"
INVALID_SCHEMA = "an invalid JSON schema"
NOWHERE = "a reference that leads nowhere in the schema"
NOTHING = "one that no text satisfies"
TOO_LARGE = "one that is too large or too costly"


@pytest.fixture(scope="module")
def backend() -> Backend:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return backend


@pytest.fixture
def compiler(backend: Backend) -> ConstraintCompiler:
    size = backend.get_vocab_size()
    return ConstraintCompiler(backend.to_str, vocab_size=size, eos_token_ids=[size - 1])


def refusal(compiler: ConstraintCompiler, sampling: dict[str, Any]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(SamplingParams(**sampling))
    assert caught.value.__cause__ is None
    return str(caught.value)


@pytest.mark.parametrize(
    ("regex", "category"),
    [
        (f"({CANARY}", INVALID_REGEX),
        (f"{CANARY}{{3,1}}", INVALID_REGEX),
        (rf"\p{{{CANARY}}}", INVALID_REGEX),
        (f"(?={CANARY})", INVALID_REGEX),
        (rf"\b{CANARY}", INVALID_REGEX),
        (f"{CANARY}[a&&b]", NOTHING),
    ],
)
def test_a_regex_is_not_quoted(compiler: ConstraintCompiler, regex: str, category: str) -> None:
    text = refusal(compiler, {"regex": regex})
    assert text.endswith(f"got {category}")
    assert CANARY not in text


@pytest.mark.parametrize(
    ("schema", "category"),
    [
        ({"type": CANARY}, INVALID_SCHEMA),
        ({"required": CANARY, "type": "object"}, INVALID_SCHEMA),
        ({"minimum": CANARY, "type": "integer"}, INVALID_SCHEMA),
        ({"type": "array", "items": CANARY}, INVALID_SCHEMA),
        ({"properties": {CANARY: 1}}, INVALID_SCHEMA),
        ({"type": "string", "format": CANARY}, "an unsupported format"),
        ({"type": "string", "pattern": f"({CANARY}"}, INVALID_REGEX),
        ({"$ref": f"http://x.org/{CANARY}"}, NOWHERE),
        ({"$ref": f"#/$defs/{CANARY}"}, NOWHERE),
        ({"$schema": CANARY}, NOWHERE),
        ({"required": [CANARY], "properties": {CANARY: False}, "type": "object"}, NOTHING),
        ({"not": {"const": CANARY}, "if": {}}, "unsupported keywords if not"),
        ({"propertyNames": {"pattern": CANARY}}, "unsupported keywords propertyNames"),
        ({"x-guidance": {CANARY: 1}}, "one that is not supported"),
        (
            {"oneOf": [{"type": "string", "pattern": CANARY}, {"type": "string"}]},
            "unsupported keywords oneOf",
        ),
    ],
)
def test_a_schema_is_not_quoted(
    compiler: ConstraintCompiler, schema: dict[str, Any], category: str
) -> None:
    text = refusal(compiler, {"json_schema": schema})
    assert text.endswith(f"got {category}")
    assert CANARY not in text


@pytest.mark.parametrize(
    "sampling",
    [
        {"regex": f"{CANARY}|(a|b)*c{{3,40}}.*"},
        {"json_schema": {"type": "object", "properties": {CANARY: {"type": "string"}}}},
        {"choice": [f"{CANARY}{n}" for n in range(100)]},
    ],
    ids=["regex", "json_schema", "choice"],
)
@pytest.mark.parametrize("limit", ["initial_lexer_fuel", "max_grammar_size"])
def test_what_is_too_large_is_not_quoted(
    compiler: ConstraintCompiler,
    monkeypatch: pytest.MonkeyPatch,
    sampling: dict[str, Any],
    limit: str,
) -> None:
    monkeypatch.setattr(constraint, "LIMITS", {limit: 1})
    text = refusal(compiler, sampling)
    assert text.endswith(f"got {TOO_LARGE}")
    assert CANARY not in text


def test_a_choice_that_the_library_cannot_take_is_not_quoted(compiler: ConstraintCompiler) -> None:
    text = refusal(compiler, {"choice": [f"\ud800{CANARY}"]})
    assert text.endswith("got UnicodeEncodeError")


def test_a_panic_of_the_library_ends_one_request(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def panic(*_: object) -> None:
        raise Panic(CANARY)

    monkeypatch.setattr(constraint, "_grammar", panic)
    assert refusal(compiler, {"choice": ["a"]}).endswith("got Panic")


def test_a_request_is_refused_where_the_library_is_not_installed(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match=r"choice must be not given: llguidance is not inst"):
        compiler.compile(SamplingParams(choice=(CANARY,)))


def test_an_output_that_does_not_follow_is_not_quoted(
    compiler: ConstraintCompiler, backend: Backend
) -> None:
    params = SamplingParams(choice=(CANARY,))
    with pytest.raises(InvalidRequest, match=r"got an output that does not follow it$"):
        compiler.compile(params, backend.encode(f"{CANARY[:7]}X").ids)
    started = compiler.compile(params)
    assert isinstance(started, Constraint)
    assert started.error == ""
    assert not started.accept(backend.encode("X").ids)
    assert started.error == "an output that does not follow it"


def test_a_message_that_is_not_known_is_not_passed_on() -> None:
    assert described(f"{CANARY} is new") == "one that is not supported"
