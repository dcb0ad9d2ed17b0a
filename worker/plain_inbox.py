"""`PlainInbox`: requests that any language adds with one XADD, validated and enqueued by workers.

    XADD {default:0}:inbox * json '{"prompt": "Why is the sky blue?", "params": {"max_tokens": 64}}'

An entry has one field, `json` or `msgpack`: the fields of a `Request`, of which only the prompt is
needed. Without a `request_id` the id is made of the entry's: entry 1700000000000-5 becomes
`0.00000001700000000000-00005`. Without a deadline it is `deadline_s`, or a day, after the entry's
time. What is wrong ends as an error under the same id, and among the dead letters.
"""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import msgpack
import redis

from tokenmill.producer.errors import InvalidRequest, Words
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import check_request_id
from tokenmill.producer.scripts import Script
from tokenmill.producer.wire import MAX_PAYLOAD_BYTES, PRIORITIES, Request, check_name

#: Entries looked at in one turn.
BATCH = 32
DEADLINE_S = 86_400
MAX_DEADLINE_S = 30 * 86_400

_ADMIT = Script("tokenmill.worker", "admit")


class PlainInbox:
    """One shard's inbox; several workers may empty it at once."""

    def __init__(
        self, server: redis.Redis, keys: Keys, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._keys = keys
        self._clock = clock
        #: The newest entry that was looked at.
        self.seen = "0-0"
        #: After a full queue: not before.
        self._retry_at = -math.inf
        #: Entries up to this one stay, until the next round.
        self._after = "-"

    def take(self) -> int:
        """Enqueue or refuse some entries; returns how many were looked at, 0 for none now."""
        if self._clock() < self._retry_at:
            return 0
        entries: Any = self._server.xrange(self._keys.inbox, self._after, "+", count=BATCH)
        if not entries:
            self._after = "-"
            return 0
        arguments: list[str | bytes | int] = []
        for entry_id, fields in entries:
            arguments += _admission(entry_id.decode(), fields or {}, self._keys.shard)
        self.seen = max(self.seen, entries[-1][0].decode(), key=_order)
        *verdicts, retry_ms = _ADMIT(self._server, self._keys.tag, arguments)
        # Behind those of a tenant over its quota others may have room; in a full queue nobody has.
        is_more = retry_ms and len(entries) == BATCH and b"BUSY" not in verdicts
        self._after = f"({entries[-1][0].decode()}" if is_more else "-"
        if retry_ms and not is_more:
            self._retry_at = self._clock() + retry_ms / 1000
        return len(verdicts)


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq)


def made_id(entry_id: str, shard: int) -> str:
    """The request id of an entry that names none."""
    ms, seq = _order(entry_id)
    return f"{shard}.{ms:020d}-{seq:05d}"


def _admission(entry_id: str, fields: dict[bytes, bytes], shard: int) -> list[str | bytes | int]:
    """The arguments of the script for one entry."""
    made = made_id(entry_id, shard)
    values: dict[str, Any] = {}
    try:
        values = _parse(fields)
        request = _request(values, entry_id, made, shard)
        payload, cost = request.pack(), request.prompt_cost
    except InvalidRequest as error:
        refusal = str(error)[:1000]
    except Exception as error:  # noqa: BLE001 - no bytes of strangers may end a worker
        refusal = str(InvalidRequest("entry", "a readable request", type(error).__name__))
    else:
        return [
            *(entry_id, made, ""),
            *(request.request_id, request.fingerprint, payload, request.tenant, request.priority),
            *(request.deadline_ms, cost, request.params.max_tokens, request.reply_to),
        ]
    request_id, tenant, priority, reply_to = _address(values, made, shard)
    return [entry_id, made, refusal, request_id, "", "", tenant, priority, 0, 0, 0, reply_to]


def _parse(fields: dict[bytes, bytes]) -> dict[str, Any]:
    expected = "one field, json or msgpack"
    if len(fields) != 1:
        raise InvalidRequest("entry", expected, sorted(fields))
    ((name, value),) = fields.items()
    if name not in (b"json", b"msgpack"):
        raise InvalidRequest("entry", expected, name)
    if len(value) > MAX_PAYLOAD_BYTES:
        raise InvalidRequest(name.decode(), f"at most {MAX_PAYLOAD_BYTES} bytes", len(value))
    try:
        parse: Callable[[bytes], Any] = json.loads if name == b"json" else msgpack.unpackb
        values = parse(value)
    # Both raise ValueError and its subclasses for what is malformed.
    except (ValueError, TypeError, RecursionError) as error:
        remedy = "see docs/protocol.md"
        raise InvalidRequest(name.decode(), "a map of fields", Words(error), remedy) from error
    if not isinstance(values, dict):
        raise InvalidRequest(name.decode(), "a map of fields", values)
    for key in values:
        if not isinstance(key, str):
            raise InvalidRequest(name.decode(), "a map with text keys", key)
    return values


def _request(values: dict[str, Any], entry_id: str, made: str, shard: int) -> Request:
    given = dict(values)
    given.setdefault("request_id", made)
    if "deadline_ms" not in given:
        deadline_s = given.pop("deadline_s", DEADLINE_S)
        is_number = isinstance(deadline_s, int | float) and not isinstance(deadline_s, bool)
        if not is_number or not 0 < deadline_s <= MAX_DEADLINE_S:
            expected = f"above 0 and at most {MAX_DEADLINE_S} seconds"
            raise InvalidRequest("deadline_s", expected, deadline_s)
        given["deadline_ms"] = int(entry_id.partition("-")[0]) + int(deadline_s * 1000)
    request = Request.from_mapping(given)
    if _shard_of(request.request_id) != shard:
        expected = f"an id of shard {shard}, beginning with `{shard}.`"
        raise InvalidRequest("request_id", expected, request.request_id)
    return request


def _shard_of(request_id: str) -> int:
    return int(request_id.partition(".")[0])


def _address(values: dict[str, Any], made: str, shard: int) -> tuple[str, str, int, str]:
    """Id, tenant, priority and reply stream of a bad request, as far as they are sound."""
    request_id = values.get("request_id", made)
    try:
        if _shard_of(check_request_id(request_id)) != shard:
            request_id = made
    except InvalidRequest:
        request_id = made
    priority = values.get("priority", 1)
    if type(priority) is not int or priority not in PRIORITIES:
        priority = 1
    return request_id, _name(values, "tenant", "default"), priority, _name(values, "reply_to", "")


def _name(values: dict[str, Any], field: str, default: str) -> str:
    try:
        return check_name(field, values.get(field, default))
    except InvalidRequest:
        return default
