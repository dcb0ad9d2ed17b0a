"""`SamplingParams`: how tokens are chosen and when they end. Standard library only.

The one type that every package shares: producers write it, the wire carries it, the engine
obeys it.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tokenmill.producer.errors import InvalidRequest, Words

MAX_TOKENS = 1_000_000
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_ADAPTER_CHARS = 256
MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 32
MAX_REGEX_CHARS = 4096
MAX_CHOICE_TEXTS = 1024
MAX_CHOICE_CHARS = 1024
MAX_SEED = 2**63 - 1

_SCALARS = frozenset({int, float, bool, str, type(None)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request, checked on construction.

    Raises:
        InvalidRequest: a field is of the wrong type or out of bounds; the error names it.
    """

    #: Most tokens to generate.
    max_tokens: int = 256
    #: End-of-sequence and stop tokens are not sampled before this many tokens.
    min_tokens: int = 0
    #: 0 takes the likeliest token (greedy); 1 samples from the model's own distribution.
    temperature: float = 0.0
    #: Keep the k likeliest tokens; 0 keeps all.
    top_k: int = 0
    #: Keep the smallest set of tokens whose probability reaches this.
    top_p: float = 1.0
    #: Keep tokens at least this likely, relative to the likeliest.
    min_p: float = 0.0
    #: Divides the positive logits of tokens in prompt or output, and multiplies the negative ones.
    repetition_penalty: float = 1.0
    #: Subtracted from the logit of every token that the output has.
    presence_penalty: float = 0.0
    #: Subtracted from a token's logit for each time that the output has it.
    frequency_penalty: float = 0.0
    #: Added to the logits of these token ids, before the penalties.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    #: Sampling noise is keyed by (seed, position); without a seed one is derived from the id.
    seed: int | None = None
    #: Strings that end the text; they are not part of it.
    stop: tuple[str, ...] = ()
    #: Token ids that end the text; they are not part of it.
    stop_token_ids: tuple[int, ...] = ()
    #: The output is JSON that this schema allows: a JSON object, or its text.
    json_schema: str | None = None
    #: The output matches this regular expression as a whole.
    regex: str | None = None
    #: The output is one of these texts.
    choice: tuple[str, ...] = ()
    #: Go on past the model's end-of-sequence token.
    ignore_eos: bool = False
    #: Give the log probability of each generated token and of this many likeliest ones, by the
    #: model's own distribution: before penalties, temperature and filters. None gives none.
    logprobs: int | None = None
    #: The same of the prompt's tokens, from the second on.
    prompt_logprobs: int | None = None
    #: The LoRA adapter to answer with, by the name that the worker knows; "" for the model alone.
    adapter: str = ""

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, MAX_TOKENS)
        _number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if not isinstance(self.adapter, str) or len(self.adapter) > MAX_ADAPTER_CHARS:
            expected = f"a name of up to {MAX_ADAPTER_CHARS} characters"
            raise InvalidRequest("adapter", expected, self.adapter)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest("ignore_eos", "true or false", self.ignore_eos)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        object.__setattr__(self, "json_schema", _json_schema(self.json_schema))
        if self.regex is not None and not _is_text(self.regex, MAX_REGEX_CHARS):
            raise InvalidRequest("regex", f"1 to {MAX_REGEX_CHARS} characters", self.regex)
        object.__setattr__(self, "choice", _choice(self.choice))
        given = [name for name in ("json_schema", "regex", "choice") if getattr(self, name)]
        if len(given) > 1:
            raise InvalidRequest(given[1], f"not given together with {given[0]}", Words("both"))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    @property
    def is_ranked(self) -> bool:
        """Whether a token is drawn from the likeliest, by top_k or top_p."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def constraint(self) -> tuple[str, str | tuple[str, ...]] | None:
        """What the output is held to: the field that says it, and its value."""
        for name in ("json_schema", "regex", "choice"):
            if value := getattr(self, name):
                return name, value
        return None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Build from plain values as a wire or a JSON row carries them.

        Raises:
            InvalidRequest: an unknown field, or one out of bounds.
        """
        for name in values:
            if name not in _defaults():
                expected = f"a sampling parameter ({', '.join(sorted(_defaults()))})"
                raise InvalidRequest(str(name), expected, name, "remove it")
        if _SCALARS.issuperset(map(type, values.values())):
            return _shared(**values)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in plain types."""
        return {
            name: _plain(value)
            for name, default in _defaults().items()
            if (value := getattr(self, name)) is not default and value != default
        }


@functools.lru_cache(maxsize=256, typed=True)
def _shared(**values: Any) -> SamplingParams:
    """Millions of requests have the same few parameters, which are checked once."""
    return SamplingParams(**values)


@functools.cache
def _defaults() -> dict[str, Any]:
    """Field name -> default value."""
    default = SamplingParams()
    return {item.name: getattr(default, item.name) for item in fields(default)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else value


def derived_seed(request_id: str) -> int:
    """The seed of a request that names none: 63 bits of its id's digest."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the `choice`-th output of one prompt: the first one has the seed itself."""
    return seed if choice == 0 else derived_seed(f"{seed}/{choice}")


def check_choices(n: object) -> None:
    """Check how many outputs of one prompt are asked for.

    Raises:
        InvalidRequest: not from 1 to `MAX_CHOICES`.
    """
    _integer("n", n, 1, MAX_CHOICES)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(name, f"an integer from {low} to {high}", value)


def _number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    is_number = isinstance(value, (float, int)) and not isinstance(value, bool)
    if is_number and low <= value <= high and not (above_low and value == low):  # type: ignore[operator]
        return
    bounds = f"above {low:g} and up to {high:g}" if above_low else f"from {low:g} to {high:g}"
    raise InvalidRequest(name, f"a number {bounds}", value)


def _logit_bias(value: object) -> dict[int, float]:
    expected = f"a map of up to {MAX_LOGIT_BIAS} token ids to numbers from -100 to 100"
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest("logit_bias", expected, value)
    for key, bias in value.items():
        _number(f"logit_bias.{key}", bias, -100.0, 100.0)
    return {_token_id(key, expected): float(bias) for key, bias in value.items()}


def _token_id(key: object, expected: str) -> int:
    """The token id of a key, which JSON and msgpack can only carry as text."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        key = int(key)
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**31:
        raise InvalidRequest("logit_bias", expected, key)
    return key


def _is_text(value: object, max_chars: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= max_chars


def _json_schema(value: object) -> str | None:
    """The text of a JSON schema, its members in the order given: output follows it."""
    if value is None:
        return None
    expected = f"a JSON object of up to {MAX_SCHEMA_BYTES} bytes and {MAX_SCHEMA_DEPTH} levels"
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest("json_schema", expected, Words(str(error)[:100])) from error
    if not isinstance(schema, Mapping) or len(text.encode("utf-8", "replace")) > MAX_SCHEMA_BYTES:
        raise InvalidRequest("json_schema", expected, schema)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest("json_schema", expected, Words(f"{_depth(schema)} levels"))
    return text


def _depth(value: object) -> int:
    """Levels of maps and lists in plain values; json has bounded them already."""
    level, depth = [value], -1
    while level:
        depth += 1
        inner = (
            item.values() if isinstance(item, Mapping) else item
            for item in level
            if isinstance(item, Mapping | list | tuple)
        )
        level = [item for items in inner for item in items]
    return depth


def _choice(value: object) -> tuple[str, ...]:
    expected = f"up to {MAX_CHOICE_TEXTS} texts of 1 to {MAX_CHOICE_CHARS} characters"
    if not isinstance(value, list | tuple) or len(value) > MAX_CHOICE_TEXTS:
        raise InvalidRequest("choice", expected, value)
    for item in value:
        if not _is_text(item, MAX_CHOICE_CHARS):
            raise InvalidRequest("choice", expected, item)
    return tuple(value)


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    expected = f"up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters"
    if not isinstance(strings, list | tuple) or len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop", expected, value)
    for item in strings:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_STOP_CHARS:
            raise InvalidRequest("stop", expected, value)
    return tuple(strings)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    expected = f"up to {MAX_STOP_TOKEN_IDS} token ids"
    if not isinstance(value, list | tuple) or len(value) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest("stop_token_ids", expected, value)
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
            raise InvalidRequest("stop_token_ids", expected, value)
    return tuple(value)
