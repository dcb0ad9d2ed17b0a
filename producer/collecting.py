"""`Collecting`: whole outputs of many requests, read from the one stream they were sent to."""

import time
from collections.abc import Iterable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import NotFound
from tokenmill.producer.following import CHECK_S, Silence
from tokenmill.producer.logprobs import unpack_logprobs
from tokenmill.producer.shards import Layout
from tokenmill.producer.steps import Call, Calls, Read, Steps
from tokenmill.producer.wire import Result, Usage, check_name, unpack_token_ids

#: Entries taken by one read.
_ENTRIES = 256


class Collecting:
    """A reader of one reply stream; one thread at a time."""

    def __init__(self, layout: Layout, name: str) -> None:
        self.name = check_name("reply_to", name)
        self._layout = layout
        #: Of each shard's stream, the id of the last entry read.
        self._cursors: dict[Any, Any] = {keys.reply(name): "0-0" for keys in layout.keys}
        #: Requests whose reply is awaited: looked after in a silence.
        self._awaited: set[str] = set()
        #: Those of them that are gone: told by the next polls.
        self._gone: list[NotFound] = []
        self._silence = Silence()
        self._heard = self._checked = time.monotonic()
        #: Those that were awaited at the last check.
        self._unheard: set[str] = set()

    def __len__(self) -> int:
        return len(self._awaited) + len(self._gone)

    def add(self, request_id: str) -> None:
        """Await a reply: `poll` raises if the server no longer knows the request."""
        self._awaited.add(request_id)

    def remove(self, request_id: str) -> None:
        """Await it no longer; an id that is not awaited is no error."""
        self._awaited.discard(request_id)
        self._gone = [error for error in self._gone if error.request_id != request_id]

    def polled(self, timeout_s: float) -> Steps[list[Result]]:
        """`Replies.poll`, as steps."""
        if self._gone:
            raise self._gone.pop(0)
        try:
            results = yield from self._read(timeout_s)
            if not results and time.monotonic() - self._heard >= MAX_BLOCK_S:
                self._heard = time.monotonic()
                results = yield from self._look_after()
            elif time.monotonic() - self._checked >= CHECK_S:
                self._checked = time.monotonic()
                yield from self._find_lost(self._unheard & self._awaited)
                self._unheard = set(self._awaited)
        except (RedisConnectionError, RedisTimeoutError) as error:
            yield self._silence.lost(error, timeout_s)
            return []
        self._silence.back()
        for result in results:
            self._awaited.discard(result.request_id)
        if results:
            self._heard = time.monotonic()
        elif self._gone:
            raise self._gone.pop(0)
        return results

    def _read(self, timeout_s: float) -> Steps[list[Result]]:
        block_ms = max(int(min(timeout_s, MAX_BLOCK_S) * 1000), 1)  # 0 would block for ever
        reply: Any = yield Read(self._cursors, _ENTRIES, block_ms)
        results: list[Result] = []
        for name, entries in reply or ():
            self._cursors[name.decode()] = entries[-1][0].decode()
            results += (result_of(fields) for _, fields in entries)
        return results

    def _look_after(self) -> Steps[list[Result]]:
        """After a silence: what is awaited may have ended behind the cursor, or be gone."""
        found = []
        for request_id in tuple(self._awaited):
            try:
                result = yield from ended_result(self._layout, request_id)
            except NotFound as error:
                self._lose(error)
                continue
            if result is not None:
                found.append(result)
        return found

    def _find_lost(self, request_ids: Iterable[str]) -> Steps[None]:
        """While others answer: whether these are still there. An entry of theirs is yet to come."""
        for number, some in self._layout.split((item, item) for item in request_ids).items():
            keys = self._layout.keys[number]
            calls = tuple(("hget", (keys.record(request_id), "state")) for request_id in some)
            replies: list[Any] = yield Calls(number, calls)
            for request_id, state in zip(some, replies, strict=True):
                if state is None:
                    self._lose(_unknown(request_id))

    def _lose(self, error: NotFound) -> None:
        self._awaited.discard(error.request_id)
        self._gone.append(error)


def _unknown(request_id: str) -> NotFound:
    text = f"no request {request_id} in this queue: a wrong id, or its result expired"
    return NotFound(text, request_id)


def ended_result(layout: Layout, request_id: str) -> Steps[Result | None]:
    """The output of a request with a reply stream, or None while it has not ended.

    Raises:
        NotFound: there is no such request, or its reply was taken or has expired.
    """
    number = layout.number_of(request_id)
    keys = layout.keys[number]
    names = ["state", "reply", "at", "finish", "reason", "offset"]
    record: Any = yield Call(number, "hmget", (keys.record(request_id), names))
    state, name, at, finish, reason, offset = (item.decode() if item else "" for item in record)
    if not state:
        raise _unknown(request_id)
    if state != "end":
        return None
    entries: Any = []
    if at:
        entries = yield Call(number, "xrange", (keys.reply(name), at, at))
    if entries:
        return result_of(entries[0][1])
    if finish != "error":
        text = f"the reply of request {request_id} was taken from {name}, or has expired"
        raise NotFound(text, request_id)
    return Result(
        request_id=request_id,
        token_ids=(),
        text="",
        finish_reason=finish,
        reason=reason,
        usage=Usage(prompt_tokens=0, completion_tokens=int(offset)),
    )


def result_of(fields: dict[bytes, bytes]) -> Result:
    """The result in an entry of a reply stream."""
    logprobs, of_prompt = unpack_logprobs(fields.get(b"l", b""))
    return Result(
        request_id=fields[b"id"].decode(),
        token_ids=unpack_token_ids(fields[b"t"]),
        text=fields[b"x"].decode(),
        finish_reason=fields[b"f"].decode(),
        reason=fields[b"y"].decode(),
        usage=Usage(prompt_tokens=int(fields[b"p"]), completion_tokens=int(fields[b"c"])),
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
    )
