"""What an error says, and what it must not say: prompts and metadata are in no log."""

import json
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import redis

from tokenmill.producer.errors import InvalidRequest, Words
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import new_request_id
from tokenmill.producer.wire import Request
from tokenmill.worker.plain_inbox import made_id
from tokenmill.worker.queue import Queue

KEYS = Keys()
SECRET = "Grandmother's address"
#: Each is wrong, and what is wrong holds what nobody else may read.
TELLING: list[dict[str, Any]] = [
    {"prompt": {SECRET: SECRET}},
    {"prompt": [1, SECRET]},
    {"prompt": [SECRET]},
    {"prompt": [{"role": SECRET, "content": "user"}]},
    {"prompt": [{"role": "user", "content": [SECRET]}]},
    {"prompt": [{"role": "user", "content": {"text": SECRET}}]},
    {"prompt": f"{SECRET}\ud800"},
    {"metadata": SECRET},
    {"metadata": {"note": [SECRET]}},
    {"metadata": {"note": SECRET * 100}},
    {"metadata": {SECRET * 10: "x"}},
    {"tools": SECRET},
    {"tools": [SECRET]},
    {"prompt": "x", "tools": [{"name": SECRET}]},
    {"params": {"stop": {SECRET: 1}}},
    {"params": {"stop": [SECRET * 100]}},
    {"params": {"choice": [SECRET, 5]}},
    {"params": {"choice": SECRET}},
    {"params": {"regex": [SECRET]}},
    {"params": {"json_schema": [SECRET]}},
    {"params": {"json_schema": SECRET}},
]


@pytest.mark.parametrize("fields", TELLING, ids=lambda fields: str(fields)[:60])
def test_no_error_tells_what_was_written(fields: dict[str, Any]) -> None:
    given = {"request_id": new_request_id(), "deadline_ms": 1, "prompt": "x", **fields}
    with pytest.raises(InvalidRequest) as caught:
        Request.from_mapping(given).pack()
    assert "Grand" not in str(caught.value)
    assert "must be" in str(caught.value)


@pytest.mark.parametrize(
    ("got", "shown"),
    [
        ("abc", "text of 3 characters"),
        (b"abc", "bytes of length 3"),
        ([1, 2], "list of length 2"),
        ({"a": 1}, "dict of length 1"),
        (object(), "a object"),
        (None, "None"),
        (True, "True"),
        (-5, "-5"),
        (Words("33 levels"), "33 levels"),
    ],
)
def test_of_a_prompt_type_and_length_are_told(got: object, shown: str) -> None:
    error = InvalidRequest("prompt[3].content", "text", got)
    assert str(error) == f"prompt[3].content must be text, got {shown}"


@pytest.mark.parametrize("field", ["prompts", "model", "jsonl", "metadata_", "tenant"])
def test_other_fields_are_shown(field: str) -> None:
    assert str(InvalidRequest(field, "x", "abc")) == f"{field} must be x, got 'abc'"


def test_no_dead_letter_tells_what_was_written(
    server: redis.Redis, make_queue: Callable[..., Queue]
) -> None:
    entries: list[dict[Any, Any]] = [
        {"json": json.dumps({"prompt": "x", **fields})} for fields in TELLING
    ]
    entries += [{"json": f'{{"prompt": "{SECRET}"'}, {"json": json.dumps(SECRET)}]
    entries += [{"msgpack": msgpack.packb({SECRET.encode(): 1})}]
    ids = [server.xadd(KEYS.inbox, entry) for entry in entries]
    while make_queue().admit():
        pass
    reasons = []
    for entry_id in ids:
        assert isinstance(entry_id, bytes)
        record = KEYS.record(made_id(entry_id.decode(), 0))
        reasons.append(server.hget(record, "reason") or b"")
    assert all(b"must be" in reason for reason in reasons), reasons
    assert not any(b"Grand" in reason for reason in reasons), reasons
    letters: Any = server.xrange(KEYS.dead)
    assert len(letters) == len(entries)
    assert SECRET not in str(letters)
