import json
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.producer import wire
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams
from tokenmill.producer.prompt import Message
from tokenmill.producer.wire import (
    Delta,
    Request,
    Result,
    Usage,
    chain_digest,
    pack_token_ids,
    unpack_token_ids,
)

ID = "0." + "A" * 26
CHAT = [{"role": "user", "content": "a"}]
GOOD: dict[str, Any] = {"request_id": ID, "prompt": "hello", "deadline_ms": 1_800_000_000_000}

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)
prompts = st.one_of(
    text,
    st.lists(st.integers(0, 2**31 - 1), min_size=1).map(tuple),
    st.lists(
        st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=text),
        min_size=1,
    ).map(tuple),
)
requests = st.builds(
    Request,
    request_id=st.from_regex(r"[0-9]\.[0-9A-Za-z_-]{26,64}", fullmatch=True).filter(str.isascii),
    prompt=prompts,
    params=st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 1000),
        temperature=st.floats(0, 2),
        seed=st.none() | st.integers(0, 2**63 - 1),
        stop=st.lists(text, max_size=3).map(tuple),
    ),
    model=st.text(max_size=20),
    tenant=st.sampled_from(["default", "a.b-c_9"]),
    priority=st.sampled_from([0, 1, 2]),
    deadline_ms=st.integers(1, 2**53 - 1),
    metadata=st.dictionaries(text, text, max_size=3),
)


@given(requests)
def test_a_request_survives_msgpack_and_json(request: Request) -> None:
    try:
        packed = request.pack()
    except InvalidRequest as error:
        assert "valid Unicode" in str(error)  # noqa: PT017
        return
    assert Request.unpack(packed) == request
    assert Request.from_mapping(json.loads(json.dumps(request.to_mapping()))) == request
    assert Request.unpack(packed).fingerprint == request.fingerprint


def test_tools_survive_msgpack() -> None:
    request = Request.from_mapping(
        {"request_id": ID, "prompt": CHAT, "deadline_ms": 1, "tools": [{"function": {"a": [None]}}]}
    )
    assert Request.unpack(request.pack()) == request
    bare = Request.from_mapping({"request_id": ID, "prompt": CHAT, "deadline_ms": 1})
    assert request.fingerprint != bare.fingerprint
    assert request.prompt_cost > bare.prompt_cost


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"request_id": "short"}, "request_id"),
        ({"request_id": "00." + "A" * 26}, "request_id"),
        ({"request_id": "0." + "A" * 25 + "}"}, "request_id"),
        ({"request_id": "0." + "A" * 65}, "request_id"),
        ({"request_id": ID + "\n"}, "request_id"),
        ({"request_id": 7}, "request_id"),
        ({"prompt": CHAT, "tools": {"a": 1}}, "tools"),
        ({"prompt": CHAT, "tools": ["a"]}, "tools[0]"),
        ({"prompt": CHAT, "tools": [{}] * 129}, "tools"),
        ({"prompt": CHAT, "tools": [{"a": "x" * 2**18}]}, "tools"),
        ({"prompt": "text", "tools": [{"a": 1}]}, "tools"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"role": "user"}}, "prompt"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": [2**31]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[0]"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "", "content": "b"}]},
            "prompt[1].role",
        ),
        ({"prompt": [{"role": "user"}]}, "prompt[0].content"),
        ({"prompt": [{"role": "user", "content": "a", "name": "b"}]}, "prompt[0].name"),
        ({"prompt": [{"role": 3, "content": "a"}]}, "prompt[0].role"),
        ({"params": {"max_tokens": 0}}, "max_tokens"),
        ({"params": {"temperature": -1}}, "temperature"),
        ({"params": {"max_tokenz": 1}}, "max_tokenz"),
        ({"params": 3}, "params"),
        ({"model": "m" * 257}, "model"),
        ({"model": None}, "model"),
        ({"tenant": "a:b"}, "tenant"),
        ({"tenant": "a{b}"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"priority": 3}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline_ms": 2**53}, "deadline_ms"),
        ({"deadline_ms": "soon"}, "deadline_ms"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"": "x"}}, "metadata"),
        ({"metadata": {"a": "x" * 1025}}, "metadata.a"),
        ({"metadata": {str(i): "x" for i in range(33)}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"color": "red"}, "color"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest, match="must be") as caught:
        Request.from_mapping({**GOOD, **fields})
    assert caught.value.field == path
    payload = msgpack.packb({"v": 1, **GOOD, **fields})
    with pytest.raises(InvalidRequest, match="must be"):
        Request.unpack(payload)


@pytest.mark.parametrize("name", ["request_id", "prompt", "deadline_ms"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be given"):
        Request.from_mapping({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgpack.packb([1, 2]),
        msgpack.packb({"v": 2, **GOOD}),
        msgpack.packb(GOOD),
        msgpack.packb({1: 2}),
        msgpack.packb({"v": 1, **GOOD}) + b"\x00",
    ],
)
def test_a_broken_payload_is_refused(payload: bytes) -> None:
    with pytest.raises(InvalidRequest, match="payload must be"):
        Request.unpack(payload)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(payload: bytes) -> None:
    with pytest.raises(InvalidRequest, match="must be"):
        Request.unpack(payload)


def test_a_payload_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_PAYLOAD_BYTES", 200)
    small = Request.from_mapping({**GOOD, "prompt": "x" * 50})
    assert len(small.pack()) <= 200
    large = Request.from_mapping({**GOOD, "prompt": "é" * 150})
    with pytest.raises(InvalidRequest, match="split the prompt"):
        large.pack()
    with pytest.raises(InvalidRequest, match="at most 200 bytes"):
        Request.unpack(b"x" * 201)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="valid Unicode"):
        Request.from_mapping({**GOOD, "prompt": "\ud800"}).pack()


def test_the_fingerprint_leaves_out_id_deadline_and_priority_alone() -> None:
    first = Request.from_mapping({**GOOD, "metadata": {"a": "1", "b": "2"}})
    repeat = Request.from_mapping(
        {
            **GOOD,
            "request_id": ID + "B",
            "deadline_ms": 5,
            "priority": 2,
            "metadata": {"b": "2", "a": "1"},
        }
    )
    assert first.fingerprint == repeat.fingerprint
    for change in (
        {"prompt": "hallo"},
        {"params": {"max_tokens": 1}},
        {"model": "m"},
        {"tenant": "t"},
    ):
        assert Request.from_mapping({**GOOD, **change}).fingerprint != first.fingerprint


def test_prompt_cost() -> None:
    assert Request.from_mapping({**GOOD, "prompt": [1, 2, 3]}).prompt_cost == 3
    assert Request.from_mapping({**GOOD, "prompt": "12345678"}).prompt_cost == 3
    assert Request.from_mapping({**GOOD, "prompt": "éééé"}).prompt_cost == 3
    chat = [{"role": "user", "content": "1234"}, {"role": "user", "content": "1234"}]
    assert Request.from_mapping({**GOOD, "prompt": chat}).prompt_cost == 18


@given(st.lists(st.integers(0, 2**32 - 1)), st.integers(0, 50))
def test_token_ids_and_digest(token_ids: list[int], cut: int) -> None:
    assert unpack_token_ids(pack_token_ids(token_ids)) == tuple(token_ids)
    whole = chain_digest("", token_ids)
    assert chain_digest(chain_digest("", token_ids[:cut]), token_ids[cut:]) == whole
    if token_ids:
        assert len(whole) == 16
        assert chain_digest("", [*token_ids[:-1], token_ids[-1] ^ 1]) != whole


def test_result_joins_deltas() -> None:
    first = Delta(request_id=ID, start=0, token_ids=(1, 2), text="a")
    last = Delta(request_id=ID, start=2, token_ids=(3,), text="b", finish_reason="length")
    assert (first.end, last.end) == (2, 3)
    result = Result.of([first, last])
    assert (result.token_ids, result.text, result.ok) == ((1, 2, 3), "ab", True)
    assert result.usage == Usage(prompt_tokens=0, completion_tokens=3)
