"""`Constraint`: what the output of one sequence may be, by a JSON schema, a regex or a choice.

Built on llguidance. Its state is a function of the output's tokens alone, so a resumed sequence
feeds what was committed and goes on. The library is loaded with the first request that needs it.
Whatever comes from outside is bounded: the size by
`SamplingParams`, the work by `LIMITS`, which count steps and not seconds, so that a schema passes
everywhere or nowhere.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tokenmill.engine.constraint_error import described
from tokenmill.producer.errors import InvalidRequest, Words
from tokenmill.producer.params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: Measured: up to 0.3 s to compile (2,000 properties), and some 10 ms for a mask, at the most.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
#: Compiled constraints that are kept: the rows of a dataset share one.
MAX_KEPT = 64
#: JSON as `json.dumps` writes it: one form, and no room for endless white space.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

#: Characters of times with nanoseconds and a zone: their fractions might have no end.
MAX_TIME = {"time": 24, "date-time": 35}
#: Keywords of a schema whose values are values.
_LITERALS = ("const", "default", "enum", "examples")


class Constraint:
    """The state of one sequence; once in error, it stays so and allows everything."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    @property
    def error(self) -> str:
        """Why the constraint cannot go on, "" while it can."""
        return described(self._matcher.get_error())

    @property
    def is_complete(self) -> bool:
        """Whether the output can only end now."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> bytes:
        """The tokens that may come next: one bit for each, lowest bit first."""
        mask = self._matcher.compute_bitmask()
        return b"\xff" * len(mask) if self._matcher.is_error() else mask

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Take tokens of the output; False where they do not follow, or a limit was reached."""
        return not self._matcher.is_error() and self._matcher.consume_tokens(list(token_ids))


class ConstraintCompiler:
    """Constraints for one tokenizer; compiled ones are kept and copied."""

    def __init__(
        self,
        tokenizer_json: Callable[[], str],
        *,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, object], LLMatcher] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def submit(
        self, params: SamplingParams, output_ids: Sequence[int] = ()
    ) -> Future[Constraint | None]:
        """`compile` by the compiler's own thread, one after the other; use one of the two."""
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="constraints")
        return self._thread.submit(self.compile, params, output_ids)

    def close(self) -> None:
        """Compile nothing more of what was submitted: the process would wait for all of it."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def compile(self, params: SamplingParams, output_ids: Sequence[int] = ()) -> Constraint | None:
        """The constraint that `params` ask for, after `output_ids`; None where they ask for none.

        Raises:
            InvalidRequest: it cannot be compiled, is too large, or the output does not follow it;
                the text says which and quotes nothing of it.
        """
        if params.constraint is None:
            return None
        field, value = key = params.constraint
        if key not in self._kept:
            self._kept[key] = self._matcher(field, value)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        constraint = Constraint(self._kept[key].deep_copy())
        if output_ids and not constraint.accept(output_ids):
            raise InvalidRequest(field, "what the output so far follows", Words(constraint.error))
        return constraint

    def _matcher(self, field: str, value: str | tuple[str, ...]) -> "LLMatcher":
        if self._tokenizer is None:
            self._tokenizer = self._load(field)
        from llguidance import LLMatcher, LLParserLimits

        try:
            limits = LLParserLimits(**LIMITS)
            matcher = LLMatcher(self._tokenizer, _grammar(value, field), log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # some limits show in the first mask only
            if not matcher.is_error():
                return matcher
            reason = described(matcher.get_error())
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no `Exception`
            reason = type(error).__name__
        raise InvalidRequest(field, _EXPECTED[field], Words(reason))

    def _load(self, field: str) -> "LLTokenizer":
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            expected = "not given: llguidance is not installed where the worker runs"
            raise InvalidRequest(field, expected, Words("a constraint")) from error
        try:
            return LLTokenizer(
                self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        except Exception as error:  # the library raises no narrower class
            expected = "not given: this model's tokenizer does not allow it"
            raise InvalidRequest(field, expected, Words(type(error).__name__)) from error


_EXPECTED = {
    "json_schema": "a JSON schema that can be compiled",
    "regex": "a regular expression that can be compiled",
    "choice": "texts that can be compiled",
}


def _grammar(value: str | tuple[str, ...], field: str) -> str:
    from llguidance import LLMatcher

    if isinstance(value, tuple):
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    if field == "regex":
        return LLMatcher.grammar_from_regex(value)
    schema = json.dumps(_bounded(json.loads(value)))
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_FORM)  # type: ignore[arg-type]


def _bounded(schema: Any) -> Any:
    """The schema with `MAX_TIME` as the longest length of times that have none."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: item if key in _LITERALS else _bounded(item) for key, item in schema.items()}
    kind = schema.get("format")
    if isinstance(kind, str) and kind in MAX_TIME:
        found.setdefault("maxLength", MAX_TIME[kind])
    return found
