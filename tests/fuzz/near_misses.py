"""`NearMisses`: entries of the inbox that are almost valid, from a seed; each says what is known of
its end.

Five kinds, in turn: sound requests; requests with one bad value, whose error must name that field;
requests with values that may be good or bad; the bytes of a request after some damage; and entries
of another form.
"""

import json
import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from tokenmill.producer.params import MAX_SEED
from tokenmill.producer.request_id import request_id_for

Fields = dict[bytes, bytes]

_OVERSIZED = 4 * 2**20 + 1
#: Of no field a good value.
NEVER: tuple[Any, ...] = ([[]], {"a": {}}, [None], -(2**70), math.nan, b"\xff\x00")
#: Beyond those, what is bad for one field.
BAD: dict[str, tuple[Any, ...]] = {
    "prompt": (
        *("", [], 0, True, {}, None, [-1], [2**31], [1, "x"], [1.0], ["x"], [[1]], [True]),
        *([{"role": "user"}], [{"role": "", "content": "x"}], [{"role": "user", "content": 1}]),
        *([{"role": "user", "content": "x", "more": 1}], [{"role": "User", "content": "x"}]),
        *(
            "\ud800",
            [{"role": "user", "content": "a\udfff"}],
            [{"role": "user", "content": "x"}] * 5000,
        ),
    ),
    "params": (None, 0, "", [], [["max_tokens", 1]]),
    "tools": (None, 0, "x", {}, [1], [None], [{}] * 129, [{"a": "x" * 300_000}]),
    "model": (None, 0, [], {}, "m" * 257, "m\ud83d"),
    "tenant": (None, 0, "", "a b", "-a", "a" * 65, "ä", "a:b", "{a}", "a\n", "\ud800"),
    "priority": (None, -1, 3, 1.0, True, "1", 2**64),
    "deadline_ms": (None, 0, -1, 2**53, "1", 1.5, True),
    "deadline_s": (None, 0, -1, 2592001, "60", True, math.inf, -math.inf, 10**400),
    "reply_to": (None, 0, "a b", "a" * 65, [], "\ud800"),
    "request_id": (
        None,
        0,
        "",
        "7",
        "0." + "x" * 25,
        "0." + "x" * 65,
        "99999." + "x" * 26,
        "00." + "x" * 26,
    ),
    "metadata": (
        *(None, 0, "", [], {"a": 1}, {"a": None}, {"": "x"}, {"a" * 65: "x"}, {"a": "x" * 1025}),
        *({str(number): "" for number in range(33)}, {"a": "\ud800"}, {"\udc00": "a"}),
    ),
}
BAD_PARAMS: dict[str, tuple[Any, ...]] = {
    "json_schema": (0, "", "x", [], "[]", True),
    "regex": (0, "", True, "a" * 10**6),
    "choice": (None, 0, "a", [1], [""], {}),
    "max_tokens": (None, 0, -1, 1_000_001, 1.0, "1", True, 2**64),
    "min_tokens": (None, -1, 10**9, "0", False),
    "temperature": (None, -0.1, 100.1, "1", True, math.nan, math.inf, 10**400),
    "top_k": (None, -1, 1_000_001, 0.5),
    "top_p": (None, 0, 1.01, "1"),
    "min_p": (None, -0.1, 1.1),
    "repetition_penalty": (None, 0, 10.1),
    "presence_penalty": (None, -2.1, 2.1),
    "frequency_penalty": (None, -2.1, 2.1),
    "logit_bias": (
        None,
        [],
        {"x": 1},
        {"-1": 1},
        {"1": 101},
        {"1": "1"},
        {"2147483648": 1},
        {"\u0661": 1},
    ),
    "seed": (-1, MAX_SEED + 1, 1.0, "1", True),
    "stop": (None, 0, "", [""], [1], ["x"] * 17, "x" * 257, ["\ud800"]),
    "stop_token_ids": (None, 1, ["1"], [-1], [2**31], [1] * 65),
    "ignore_eos": (None, 0, 1, "true"),
    "logprobs": (-1, 21, 1.0, "1", True),
    "prompt_logprobs": (-1, 21),
}
GOOD_PARAMS: tuple[dict[str, Any], ...] = (
    *({}, {"max_tokens": 3}, {"temperature": 1, "seed": 7}, {"top_p": 0.5, "top_k": 5}),
    *({"stop": "x"}, {"stop": ["a", "b"]}, {"stop_token_ids": [1]}, {"logit_bias": {"5": 1.5}}),
    *({"max_tokens": 1_000_000, "min_tokens": 2}, {"seed": MAX_SEED}, {"ignore_eos": True}),
)
WORDS = ("", "a", "prompt", "x" * 300, "\x00", "\ud800", "\u202e", "0.5", "null", "😀")
NUMBERS = (
    0,
    1,
    -1,
    2**31,
    2**63,
    2**64 - 1,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e308,
    math.inf,
    math.nan,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, and what is known of how its request ends."""

    kind: str
    fields: Fields
    #: True: not as an error of its form; False: as one; None: either.
    is_sound: bool | None = None
    #: What the error must name.
    named: str = ""


class NearMisses:
    """An endless source of entries."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)
        self._count = 0

    def __next__(self) -> Entry:
        self._count += 1
        makers = (self._sound, self._one_bad, self._one_bad, self._random, self._damaged)
        maker = makers[self._count % 5] if self._count % 23 else self._other_form
        return maker()

    def __iter__(self) -> "NearMisses":
        return self

    def request(self) -> dict[str, Any]:
        """The fields of a sound request."""
        rng = self._rng
        prompts: list[Any] = ["x", "why?" * rng.randint(1, 40), [1, 2, 3]]
        prompts.append([{"role": "user", "content": "hi"}])
        values: dict[str, Any] = {"prompt": rng.choice(prompts)}
        options = {
            "params": rng.choice(GOOD_PARAMS),
            "tenant": rng.choice(["a", "b", "c.d_e-f"]),
            "priority": rng.randint(0, 2),
            "deadline_s": rng.choice([3600, 3600.5, 2_592_000]),
            "metadata": {"row": str(self._count)},
            "model": "",
            "request_id": request_id_for(f"{self._count}"),
        }
        return values | {name: item for name, item in options.items() if rng.random() < 0.3}

    def _sound(self) -> Entry:
        return Entry("sound", self._entry(self.request()), is_sound=True)

    def _one_bad(self) -> Entry:
        rng = self._rng
        values = self.request()
        where = rng.random()
        if where < 0.45:
            name = rng.choice(list(BAD))
            values.pop("deadline_s" if name == "deadline_ms" else "", None)
            never = () if name == "params" else NEVER  # there it is a field of the map that is bad
            values[name] = rng.choice([*BAD[name], *never])
        elif where < 0.9:
            name = rng.choice(list(BAD_PARAMS))
            never = () if name == "json_schema" else NEVER  # any map is a schema
            values["params"] = {name: rng.choice([*BAD_PARAMS[name], *never])}
        else:
            name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 12))) + "_"
            values |= {"params": {name: 1}} if rng.random() < 0.5 else {name: 1}
        return Entry("one bad field", self._entry(values), is_sound=False, named=name)

    def _random(self) -> Entry:
        values = self.request()
        for _ in range(self._rng.randint(1, 4)):
            if self._rng.random() < 0.5:
                values[self._rng.choice([*BAD, *WORDS])] = self._value(3)
            else:
                some = {self._rng.choice([*BAD_PARAMS, *WORDS]): self._value(3) for _ in range(2)}
                values["params"] = some
        return Entry("random values", self._entry(values))

    def _value(self, depth: int) -> Any:
        rng = self._rng
        kind = rng.randint(0, 7 if depth else 5)
        if kind == 6:
            return [self._value(depth - 1) for _ in range(rng.randint(0, 4))]
        if kind == 7:
            return {rng.choice(WORDS): self._value(depth - 1) for _ in range(rng.randint(0, 4))}
        return rng.choice((rng.choice(WORDS), rng.choice(NUMBERS), None, rng.random() < 0.5))

    def _damaged(self) -> Entry:
        ((name, data),) = self._entry(self.request()).items()
        return Entry("damaged bytes", {name: mutated(self._rng, data)})

    def _other_form(self) -> Entry:
        rng = self._rng
        deep = rng.choice([5, 500, 5000, 100_000])
        forms: list[Fields] = [
            {b"json": b"[" * deep + b"]" * deep},
            {b"json": b'{"prompt":' * deep},
            {b"msgpack": b"\x91" * deep + b"\xc0"},
            {b"msgpack": b"\x81\xa1a" * deep + b"\xc0"},
            {b"json": b"9" * rng.choice([100, 5000])},
            {b"json": b'{"prompt": "x", "priority": ' + b"9" * 5000 + b"}"},
            {b"json": b'{"prompt": "x"'},
            {b"json": b'\xef\xbb\xbf{"prompt": 5}'},
            {b"json": b'"prompt"'},
            {
                b"msgpack": msgpack.packb(
                    {"prompt": msgpack.ExtType(rng.randint(0, 127), b"\x00" * 8)}
                )
            },
            {b"msgpack": b"\xd6\xff\x00\x00\x00\x01"},
            {b"msgpack": b"\xc7\x0c\xff" + b"\xff" * 12},
            {b"msgpack": b"\xdf\xff\xff\xff\xff"},
            {b"msgpack": b"\xdb\xff\xff\xff\xff"},
            {b"msgpack": msgpack.packb({b"prompt": "x"})},
            {b"msgpack": b"\x81\x91\x01\x02"},
            {b"xml": b"<prompt/>"},
            {b"": b""},
            {b"json": b'{"prompt":""}', b"msgpack": b"\x80"},
            {b"\xff\xfe": b"\xff" * rng.randint(0, 100)},
        ]
        if rng.random() < 0.2:
            return Entry("another form", {b"json": _nested(rng)})
        if rng.random() < 0.02:
            forms = [
                {b"json": b'{"prompt":"' + b"x" * _OVERSIZED + b'"}'},
                {b"msgpack": b"\xc0" * _OVERSIZED},
                {b"x" * _OVERSIZED: b""},
            ]
        return Entry("another form", rng.choice(forms), is_sound=False)

    def _entry(self, values: dict[str, Any]) -> Fields:
        if self._rng.random() < 0.5:
            try:
                return {b"msgpack": msgpack.packb(values)}
            except (OverflowError, UnicodeEncodeError):  # JSON can carry it
                pass
        return {b"json": json.dumps(values, default=lambda _: {"": None}).encode()}


def _nested(rng: random.Random) -> bytes:
    """A value that may be nested, around where recursion ends."""
    deep = rng.choice([10, 60, 200, 500, 900]) + rng.randint(0, 99)
    value = '{"a":' * deep + "1" + "}" * deep
    if rng.random() < 0.5:
        return b'{"prompt": "x", "params": {"json_schema": %s}}' % value.encode()
    return b'{"prompt": [{"role": "user", "content": "x"}], "tools": [%s]}' % value.encode()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes after one to eight changes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1)
        changes: tuple[Callable[[], None], ...] = (
            lambda at=at: changed.__setitem__(slice(at, at + 1), bytes([rng.randrange(256)])),  # type: ignore[misc]
            lambda at=at: changed.__setitem__(slice(at, at), rng.randbytes(rng.randint(1, 4))),  # type: ignore[misc]
            lambda at=at: changed.__delitem__(slice(at, at + rng.randint(1, 6))),  # type: ignore[misc]
            lambda at=at: changed.__setitem__(slice(at, at), changed[: rng.randint(0, 30)]),  # type: ignore[misc]
            lambda at=at: changed.__delitem__(slice(at, None)),  # type: ignore[misc]
        )
        rng.choice(changes)()
    return bytes(changed)
