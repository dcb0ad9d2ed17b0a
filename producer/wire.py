"""What travels between producers and workers: requests, deltas, results, and their bounds.

Bytes on the wire are msgpack of plain maps, text is UTF-8, token ids are packed little-endian
uint32. Everything is checked when it is built, so whatever arrives was checked twice.
Longer than other files, so that the format can be read in one place; prompts are in `prompt.py`.
"""

import functools
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import msgpack

from tokenmill.producer.errors import InvalidRequest, Words
from tokenmill.producer.logprobs import TokenLogprobs
from tokenmill.producer.params import SamplingParams
from tokenmill.producer.prompt import Prompt, check_prompt, is_chat, plain_prompt, prompt_cost
from tokenmill.producer.request_id import check_request_id

WIRE_VERSION = 1
MAX_PAYLOAD_BYTES = 4 * 2**20
MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 2**10
MAX_METADATA = 32
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 1024
MAX_MODEL = 256
MAX_TIME_MS = 2**53 - 1
PRIORITIES = (0, 1, 2)
#: Finish reasons; "" in a delta means that more follows.
FINISH_REASONS = frozenset({"stop", "length", "cancelled", "expired", "error"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One thing to generate, checked on construction.

    Raises:
        InvalidRequest: a field is of the wrong type or out of bounds; `field` is its path,
            such as `prompt[3].role`.
    """

    #: `<shard>.<26 to 64 characters>`; the same id with the same content is one request.
    request_id: str
    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    #: "" takes whatever model the queue serves.
    model: str = ""
    tenant: str = "default"
    #: 0 is served first, then 1, then 2.
    priority: int = 1
    #: Unix time in ms after which the request ends as "expired" with what it has.
    deadline_ms: int
    #: "" streams tokens as they come. A name delivers the whole output at the end instead, as one
    #: entry of the reply stream of that name, which costs far less: see `producer.replies`.
    reply_to: str = ""
    #: For the model's chat template: JSON objects, most often `{"type": "function", ...}`.
    tools: tuple[Mapping[str, Any], ...] = ()
    #: Carried along for the producer's own use; the worker does not read it.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: What `pack` and `fingerprint` give, once made.
    _seal: tuple[bytes, str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_request_id(self.request_id)
        object.__setattr__(self, "prompt", check_prompt(self.prompt))
        if not isinstance(self.params, SamplingParams):
            raise InvalidRequest("params", "SamplingParams", self.params)
        if not isinstance(self.model, str) or len(self.model) > MAX_MODEL:
            raise InvalidRequest("model", f"a name of up to {MAX_MODEL} characters", self.model)
        check_name("tenant", self.tenant)
        if self.reply_to != "":
            check_name("reply_to", self.reply_to)
        if not _is_int(self.priority) or self.priority not in PRIORITIES:
            raise InvalidRequest("priority", "0 (high), 1 (normal) or 2 (low)", self.priority)
        if not _is_int(self.deadline_ms) or not 0 < self.deadline_ms <= MAX_TIME_MS:
            raise InvalidRequest("deadline_ms", "a unix time in milliseconds", self.deadline_ms)
        object.__setattr__(self, "tools", _tools(self.tools, self.prompt))
        object.__setattr__(self, "metadata", _metadata(self.metadata))

    @property
    def prompt_cost(self) -> int:
        """Prompt tokens: exact for token ids, else an estimate (4 bytes a token)."""
        tools = len(json.dumps(list(self.tools))) // 4 if self.tools else 0
        return tools + prompt_cost(self.prompt)

    @property
    def fingerprint(self) -> str:
        """Hex digest of all but id, deadline and priority: what makes a repeat a repeat."""
        return self._sealed()[1]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as JSON or msgpack carry them.

        Raises:
            InvalidRequest: an unknown or missing field, or one out of bounds.
        """
        _known(values)
        given = dict(values)
        for name in ("request_id", "prompt", "deadline_ms"):
            if name not in given:
                raise InvalidRequest(name, "given", None)
        params = given.get("params", {})
        if not isinstance(params, SamplingParams):
            if not isinstance(params, Mapping):
                raise InvalidRequest("params", "a map of sampling parameters", params)
            given["params"] = SamplingParams.from_mapping(params)
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """Plain types, without the fields that have their default; undone by `from_mapping`."""
        values: dict[str, Any] = {"request_id": self.request_id, "deadline_ms": self.deadline_ms}
        values["prompt"] = plain_prompt(self.prompt)
        optional = {
            "params": self.params.to_mapping(),
            "model": self.model,
            "reply_to": self.reply_to,
            "tools": list(self.tools),
            "metadata": dict(self.metadata),
        }
        values.update({name: value for name, value in optional.items() if value})
        if self.tenant != "default":
            values["tenant"] = self.tenant
        if self.priority != 1:
            values["priority"] = self.priority
        return values

    def pack(self) -> bytes:
        """As msgpack, at most `MAX_PAYLOAD_BYTES` long.

        Raises:
            InvalidRequest: it is longer, or its text is not valid Unicode.
        """
        payload = self._sealed()[0]
        if len(payload) > MAX_PAYLOAD_BYTES:
            expected = f"a request of at most {MAX_PAYLOAD_BYTES} bytes"
            raise InvalidRequest("prompt", expected, len(payload), "split the prompt")
        return payload

    def _sealed(self) -> tuple[bytes, str]:
        """Payload and fingerprint, made together and once."""
        seal = self._seal
        if seal is None:
            values = self.to_mapping()
            try:
                payload: bytes = msgpack.packb({"v": WIRE_VERSION, **values})
            except UnicodeEncodeError as error:
                field = _not_unicode(values)
                raise InvalidRequest(field, "valid Unicode text", Words(error.reason)) from error
            for name in ("request_id", "deadline_ms", "priority"):
                values.pop(name, None)
            content: bytes = msgpack.packb(_sorted(values))
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            seal = (payload, digest)
            object.__setattr__(self, "_seal", seal)
        return seal

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Undo `pack`, trusting nothing.

        Raises:
            InvalidRequest: not msgpack, another version, or a field out of bounds.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            expected = f"at most {MAX_PAYLOAD_BYTES} bytes"
            raise InvalidRequest("payload", expected, len(payload), "split the prompt")
        try:
            values = msgpack.unpackb(payload, strict_map_key=True)
        # msgpack raises ValueError and its subclasses, and UnicodeDecodeError is one of them.
        except (ValueError, TypeError) as error:
            raise InvalidRequest("payload", "a msgpack map", Words(type(error).__name__)) from error
        if not isinstance(values, dict) or values.pop("v", None) != WIRE_VERSION:
            expected = f"a msgpack map of version {WIRE_VERSION}"
            remedy = "upgrade the older of producer and worker"
            raise InvalidRequest("payload", expected, Words(type(values).__name__), remedy)
        return cls.from_mapping(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens a request took; a prompt that no worker ever saw counts 0."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of a request's output. The last has a `finish_reason`, and may have tokens too."""

    request_id: str
    #: Offset of the first of `token_ids`; `end` is where the next delta starts.
    start: int
    token_ids: tuple[int, ...]
    text: str
    #: "" goes on; else one of `FINISH_REASONS`.
    finish_reason: str = ""
    #: Why, where `finish_reason` is not "stop" or "length".
    reason: str = ""
    #: In the last delta only.
    usage: Usage | None = None
    #: `chain_digest` of all tokens up to `end`: shows a fork after a server rolled back.
    digest: str = ""
    #: One for each of `token_ids`, where asked for.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: Of the prompt's tokens from the second on, where asked for: in the first delta.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def end(self) -> int:
        """Token offset after this delta: follow from here to go on."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A whole output."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    reason: str
    usage: Usage
    #: As in the deltas.
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Self:
        """Join all deltas of one request, the last one ending it."""
        last = deltas[-1]
        token_ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
        return cls(
            request_id=last.request_id,
            token_ids=token_ids,
            text="".join(delta.text for delta in deltas),
            finish_reason=last.finish_reason,
            reason=last.reason,
            usage=last.usage or Usage(prompt_tokens=0, completion_tokens=len(token_ids)),
            logprobs=tuple(row for delta in deltas for row in delta.logprobs),
            prompt_logprobs=tuple(row for delta in deltas for row in delta.prompt_logprobs),
        )

    def as_delta(self) -> Delta:
        """The whole output as its first and last delta."""
        return Delta(
            request_id=self.request_id,
            start=0,
            token_ids=self.token_ids,
            text=self.text,
            finish_reason=self.finish_reason,
            reason=self.reason,
            usage=self.usage,
        )

    @property
    def ok(self) -> bool:
        """Whether the model ended it, and not an error, a deadline or a cancel."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A worker's registration: what it serves, and where it runs."""

    worker_id: str
    model: str
    host: str
    pid: int
    started_ms: int
    version: str = ""
    #: Adapters of the model, which a request may name in its place.
    adapters: tuple[str, ...] = ()
    #: How it holds the weights of linears, and keys and values; "" of a worker that does not say.
    quantization: str = ""
    kv_cache_dtype: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """Every name that a request may give as its model."""
        return (self.model, *self.adapters)


def pack_token_ids(token_ids: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32."""
    ids = tuple(token_ids)
    return struct.pack(f"<{len(ids)}I", *ids)


def unpack_token_ids(packed: bytes) -> tuple[int, ...]:
    """Undo `pack_token_ids`."""
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def chain_digest(previous: str, token_ids: Iterable[int]) -> str:
    """Running blake2b-64 over token ids, one link a token, so that no split into deltas shows.

    `previous` is the hex digest so far, "" at the start; returns 16 hex digits.
    """
    link = bytes.fromhex(previous)
    for token_id in token_ids:
        link = hashlib.blake2b(link + token_id.to_bytes(4, "little"), digest_size=8).digest()
    return link.hex()


def check_name(name: str, value: object) -> str:
    """The value, if it may be the name of a queue or tenant: it becomes part of a key.

    Raises:
        InvalidRequest: it may not.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        expected = "1 to 64 of A-Z a-z 0-9 _ . -, beginning with a letter or digit"
        raise InvalidRequest(name, expected, value)
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@functools.cache
def _field_names() -> frozenset[str]:
    return frozenset(item.name for item in fields(Request) if item.init)


def _known(values: Mapping[str, Any]) -> None:
    known = _field_names()
    for name in values:
        if name not in known:
            expected = f"a field of a request ({', '.join(sorted(known))})"
            raise InvalidRequest(str(name), expected, name, "remove it")


def _tools(value: object, prompt: Prompt) -> tuple[Mapping[str, Any], ...]:
    expected = f"a list of up to {MAX_TOOLS} JSON objects, {MAX_TOOLS_BYTES} bytes in all"
    if value == ():
        return ()
    if not isinstance(value, list | tuple) or len(value) > MAX_TOOLS:
        raise InvalidRequest("tools", expected, value)
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"tools[{index}]", "a JSON object", item)
    if value and not is_chat(prompt):
        expected = "not given where the prompt is no chat messages"
        raise InvalidRequest("tools", expected, value)
    try:
        size = len(json.dumps(list(value), ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest("tools", expected, Words(type(error).__name__)) from error
    if size > MAX_TOOLS_BYTES:
        raise InvalidRequest("tools", expected, size)
    return tuple(value)


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or len(value) > MAX_METADATA:
        raise InvalidRequest("metadata", f"a map of at most {MAX_METADATA} strings", value)
    for key, item in value.items():
        if not isinstance(key, str) or not 1 <= len(key) <= MAX_METADATA_KEY:
            raise InvalidRequest("metadata", f"keys of 1 to {MAX_METADATA_KEY} characters", key)
        if not isinstance(item, str) or len(item) > MAX_METADATA_VALUE:
            expected = f"a string of at most {MAX_METADATA_VALUE} characters"
            raise InvalidRequest(f"metadata.{key}", expected, item)
    return dict(value)


def _not_unicode(values: Mapping[str, Any]) -> str:
    """The field whose text cannot be encoded."""
    for name, value in values.items():
        try:
            msgpack.packb(value)
        except UnicodeEncodeError:
            return _not_unicode(value) if name == "params" else name
    return "request"


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return value
