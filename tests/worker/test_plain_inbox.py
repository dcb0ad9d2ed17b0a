"""What any language adds with one XADD: enqueued, or ended as an error that names the field."""

import json
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmill.producer.client import Client
from tokenmill.producer.errors import NotFound
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import request_id_for
from tokenmill.worker.plain_inbox import BATCH, made_id
from tokenmill.worker.queue import Queue

MakeQueue = Callable[..., Queue]
KEYS = Keys()
AMPLE: dict[str, Any] = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}


def add(server: redis.Redis, **fields: Any) -> str:
    """XADD one JSON entry; returns the request id that it gets."""
    return raw(server, {"json": json.dumps(fields)})


def raw(server: redis.Redis, entry: dict[Any, Any]) -> str:
    entry_id: Any = server.xadd(KEYS.inbox, entry)
    return made_id(entry_id.decode(), 0)


def test_one_field_is_enough(server: redis.Redis, client: Client, make_queue: MakeQueue) -> None:
    made = add(server, prompt="hello")
    packed = raw(server, {"msgpack": msgpack.packb({"prompt": "hi", "params": {"max_tokens": 3}})})
    queue = make_queue()
    assert queue.claim(**AMPLE) == []
    assert queue.num_inbox == 2
    assert queue.admit() == 2
    first, second = queue.claim(**AMPLE)
    assert (first.request_id, first.request.prompt) == (made, "hello")
    assert (second.request_id, second.request.params.max_tokens) == (packed, 3)
    assert queue.num_inbox == 0
    day = first.request.deadline_ms - int(made.split(".")[1].split("-")[0])
    assert day == 86_400_000


def test_a_given_id_is_kept_and_a_repeat_is_one_request(
    server: redis.Redis, make_queue: MakeQueue
) -> None:
    request_id = request_id_for("row 7")
    for _ in range(2):
        add(server, prompt="hello", request_id=request_id, deadline_s=60)
    queue = make_queue()
    assert queue.admit() == 2
    assert [claim.request_id for claim in queue.claim(**AMPLE)] == [request_id]
    assert server.xlen(KEYS.inbox) == 0


def test_an_id_with_another_content_is_refused_under_a_made_id(
    server: redis.Redis, client: Client, make_queue: MakeQueue
) -> None:
    request_id = request_id_for("row 7")
    add(server, prompt="hello", request_id=request_id)
    made = add(server, prompt="goodbye", request_id=request_id)
    queue = make_queue()
    queue.admit()
    assert "request_id must be a new id" in client.result(made).reason
    assert len(queue.claim(**AMPLE)) == 1


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"json": b"{"}, "json must be a map"),
        ({"json": b"[1]"}, "json must be a map"),
        ({"json": b"[" * 100_000}, "json must be a map"),
        ({"json": b'{"prompt": "x", "prompt_": 1}'}, "prompt_ must be"),
        ({"json": b'{"prompt": ""}'}, "prompt must be"),
        ({"json": b'{"prompt": "x", "params": {"max_tokens": 0}}'}, "max_tokens must be"),
        ({"json": b'{"prompt": "x", "params": {"temperature": NaN}}'}, "temperature must be"),
        ({"json": b'{"prompt": "x", "deadline_s": -1}'}, "deadline_s must be"),
        (
            {"json": b'{"prompt": "x", "params": {"temperature": 1' + b"0" * 400 + b"}}"},
            "temperature must be",
        ),
        ({"json": b'{"prompt": "x", "": 1}'}, "'' must be"),
        ({"json": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}"}, " must be "),
        ({"json": b'{"prompt": "x", "metadata": {"a": "\\ud800"}}'}, "metadata must be valid"),
        ({"json": b'{"prompt": "x", "params": {"stop": "\\ud800"}}'}, "stop must be valid"),
        (
            {"json": b'{"prompt": "x", "request_id": "99999.' + b"0" * 26 + b'"}'},
            "request_id must be an id of shard 0",
        ),
        ({"json": b'{"prompt": "x", "tenant": "a b"}'}, "tenant must be"),
        ({"json": b'{"prompt": "x", "priority": 1.0}'}, "priority must be"),
        ({"json": b'{"prompt": "x", "request_id": "7"}'}, "request_id must be"),
        ({"json": b'{"prompt": "x", "request_id": "1.00000000000000000000000000"}'}, "shard 0"),
        ({"json": b'{"prompt": "\\ud800"}'}, "prompt must be valid Unicode"),
        ({"json": b'{"\\ud800": 1}'}, r"\ud800 must be"),
        ({"json": b"\xff"}, "json must be a map"),
        ({"msgpack": b"\xc1"}, "msgpack must be a map"),
        ({"msgpack": b"\x81\x01\x02"}, "msgpack must be a map"),
        ({"msgpack": b"\x81\xc4\x01a\x02"}, "msgpack must be a map"),
        ({"other": b"{}"}, "entry must be one field"),
        ({"json": b"{}", "more": b""}, "entry must be one field"),
        ({"json": b"x" * (4 * 2**20 + 1)}, "json must be at most"),
    ],
)
def test_what_is_wrong_ends_under_its_id_and_as_a_dead_letter(
    server: redis.Redis,
    client: Client,
    make_queue: MakeQueue,
    entry: dict[Any, bytes],
    named: str,
) -> None:
    made = raw(server, entry)
    good = add(server, prompt="hello")
    queue = make_queue()
    assert queue.admit() == 2
    result = client.result(made)
    assert (result.finish_reason, result.usage.completion_tokens) == ("error", 0)
    assert named in result.reason
    letters: Any = server.xrange(KEYS.dead)
    ((_, letter),) = letters
    assert letter[b"id"].decode() == made
    assert [claim.request_id for claim in queue.claim(**AMPLE)] == [good]


def test_a_bad_request_is_told_where_it_asked(
    server: redis.Redis, client: Client, make_queue: MakeQueue
) -> None:
    request_id = request_id_for("row 7")
    add(server, prompt="", request_id=request_id, reply_to="mine", tenant="me", priority=0)
    make_queue().admit()
    (result,) = client.replies("mine").poll(1)
    assert (result.request_id, result.finish_reason) == (request_id, "error")


def test_a_full_queue_leaves_the_rest_and_others_pass(
    server: redis.Redis, make_queue: MakeQueue
) -> None:
    now = [1000.0]
    server.hset(KEYS.settings, "quota:small", 1)
    for _ in range(BATCH + 1):
        add(server, prompt="x", tenant="small")
    add(server, prompt="y", tenant="other")
    queue = make_queue()
    queue._plain._clock = lambda: now[0]
    assert queue.admit() == BATCH
    assert queue.admit() == 2
    assert {claim.request.tenant for claim in queue.claim(**AMPLE)} == {"small", "other"}
    assert server.xlen(KEYS.inbox) == BATCH
    assert queue.admit() == 0  # not before the retry-after
    now[0] += 3
    assert queue.admit() == BATCH


def test_an_entry_wakes_who_waits(server: redis.Redis, make_queue: MakeQueue) -> None:
    queue = make_queue()
    queue.claim(**AMPLE)
    assert queue.wait(0.01) is False
    add(server, prompt="x")
    assert queue.wait(5) is True
    queue.admit()
    assert len(queue.claim(**AMPLE)) == 1
    assert queue.wait(0.01) is False


class LateReader:
    """Saw the inbox before another worker emptied it."""

    def __init__(self, server: redis.Redis, entries: Any) -> None:
        self._server, self._entries = server, entries

    def xrange(self, *_args: Any, **_options: Any) -> Any:
        return self._entries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


def test_two_workers_admit_once(server: redis.Redis, make_queue: MakeQueue) -> None:
    add(server, prompt="x")
    one, two = make_queue("w1"), make_queue("w2")
    entries: Any = server.xrange(KEYS.inbox)
    one.admit()
    server.xadd(KEYS.inbox, {"json": "{}"})
    two._plain._server = LateReader(server, entries)  # type: ignore[assignment]
    assert two.admit() == 1
    assert len(one.claim(**AMPLE)) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = [
    *("prompt", "params", "model", "tenant", "priority", "deadline_ms", "deadline_s"),
    *("metadata", "reply_to", "request_id", "max_tokens"),
]
ENTRY = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), JSON).map(
        lambda values: {b"json": json.dumps(values).encode()}
    ),
    st.dictionaries(st.sampled_from(FIELDS), JSON).map(
        lambda values: {b"json": json.dumps({"prompt": "x", **values}).encode()}
    ),
    st.dictionaries(
        st.sampled_from([b"json", b"msgpack", b"other"]), st.binary(max_size=200), min_size=1
    ),
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(entries=st.lists(ENTRY, min_size=1, max_size=8))
def test_no_entry_harms_a_worker(
    server: redis.Redis, client: Client, make_queue: MakeQueue, entries: list[dict[Any, bytes]]
) -> None:
    server.flushdb()
    made = [raw(server, entry) for entry in entries]
    queue = make_queue()
    while queue.admit():
        pass
    assert server.xlen(KEYS.inbox) == 0
    live = {claim.request_id for claim in queue.claim(**AMPLE)}
    letters: Any = server.xrange(KEYS.dead)
    ended = {fields[b"id"].decode(): fields[b"reason"].decode() for _, fields in letters}
    assert len(live) + len(ended) == len(made)
    assert all(" must be " in reason for reason in ended.values())
    for request_id in made:
        if request_id in ended:
            assert client.result(request_id).finish_reason == "error"
        elif request_id not in live:  # it named another
            with pytest.raises(NotFound):
                client.result(request_id)
