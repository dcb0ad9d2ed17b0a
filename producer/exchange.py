"""`Exchange`: what a producer says to a queue and what the answers mean, as `steps`.

`Client` performs them with blocking connections, `AsyncClient` with those of asyncio.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tokenmill.producer.address import shown_url
from tokenmill.producer.collecting import ended_result
from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import (
    Busy,
    Conflict,
    InvalidRequest,
    NotFound,
    ServerUnreachable,
    WrongServer,
)
from tokenmill.producer.following import Following, Silence, check_position
from tokenmill.producer.params import SamplingParams, check_choices, choice_seed, derived_seed
from tokenmill.producer.prompt import Message
from tokenmill.producer.refusals import is_about_the_server
from tokenmill.producer.request_id import new_request_id, request_id_for
from tokenmill.producer.scripts import Script
from tokenmill.producer.shards import Layout
from tokenmill.producer.steps import Call, Calls, Read, Steps
from tokenmill.producer.wire import Delta, Request, Result, WorkerInfo, check_name

MAX_DEADLINE_S = 30 * 86_400
#: One enqueue call: at most so many requests and about so many bytes.
_BATCH = 64
_BATCH_BYTES = 4 * 2**20
#: What a reader has kept is forgotten by the server after so long.
KEPT_S = 600.0
#: Ids of one call that forgets.
_FORGET_BATCH = 256

_ENQUEUE = Script("tokenmill.producer", "enqueue")
_CANCEL = Script("tokenmill.producer", "cancel")
_FORGET = Script("tokenmill.producer", "forget")

#: A prompt as users write it.
AnyPrompt = str | Sequence[int] | Sequence[Mapping[str, str]] | Sequence[Message]


class Exchange:
    """One producer's operations on one queue, as `Client` describes them."""

    def __init__(
        self,
        layout: Layout,
        *,
        url: str,
        tenant: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`url` is for messages."""
        self.layout = layout
        self.queue = layout.queue
        self.tenant = check_name("tenant", tenant)
        self._url = shown_url(url)
        #: Deadlines are made with it, and sent with it: the server goes by its own.
        self.clock = clock

    def new_request(
        self,
        prompt: AnyPrompt,
        *,
        model: str = "",
        priority: int = 1,
        request_id: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        deadline_s: float = 86_400,
        metadata: Mapping[str, str] | None = None,
        reply_to: str = "",
        **sampling: Any,
    ) -> Request:
        """Build and check a request without sending it; `sampling` are fields of SamplingParams.

        With `reply_to` its whole output becomes one entry of `replies(reply_to)`, which costs a
        fraction of a stream of deltas; it cannot be followed.

        Raises:
            InvalidRequest: a field out of bounds.
        """
        if not isinstance(deadline_s, int | float) or not 0 < deadline_s <= MAX_DEADLINE_S:
            expected = f"above 0 and at most {MAX_DEADLINE_S} seconds"
            raise InvalidRequest("deadline_s", expected, deadline_s)
        request = Request.from_mapping(
            {
                "request_id": self._new_id() if request_id is None else request_id,
                "prompt": prompt,
                "params": SamplingParams.from_mapping(sampling),
                "model": model,
                "tools": tools,
                "tenant": self.tenant,
                "priority": priority,
                "deadline_ms": int((self.clock() + deadline_s) * 1000),
                "metadata": metadata or {},
                "reply_to": reply_to,
            }
        )
        self.layout.number_of(request.request_id)  # checks it
        request.pack()  # its size is checked here rather than among others in submit_many
        return request

    def _new_id(self) -> str:
        return new_request_id(self.layout.any_number())

    def id_for(self, key: str) -> str:
        """The request id of an idempotency key of any form: the same key gives the same id."""
        return request_id_for(key, self.layout.number_for(key))

    def new_choices(
        self, prompt: AnyPrompt, *, n: int, request_id: str | None = None, **fields: Any
    ) -> list[Request]:
        """Build n requests for n outputs of one prompt, each with a seed of its own.

        The first is what `new_request` would build; the ids of the others follow from its id, so
        that repeating the call with a `request_id` gives the same requests.

        Raises:
            InvalidRequest: a field out of bounds.
        """
        check_choices(n)
        first = self.new_request(prompt, request_id=request_id, **fields)
        given = first.params.seed
        seed = derived_seed(first.request_id) if given is None else given
        return [first] + [
            replace(
                first,
                request_id=self.id_for(f"{first.request_id}/{choice}"),
                params=replace(first.params, seed=choice_seed(seed, choice)),
            )
            for choice in range(1, n)
        ]

    def submit_many(self, requests: Iterable[Request]) -> Steps[list[str]]:
        ids: list[str] = []
        for batch in _batches(requests, _BATCH * self.layout.count):
            parts = self.layout.split((item[0].request_id, item) for item in batch)
            accepted = len(ids)
            for number, part in parts.items():
                for first in range(0, len(part), _BATCH):
                    some = part[first : first + _BATCH]
                    yield from self._enqueue(number, some, accepted)
                    accepted += len(some)
            ids += (request.request_id for request, _ in batch)
        return ids

    def follow(self, following: Following, request_id: str, start: int) -> Steps[None]:
        """Add a request to what is followed, if it can be."""
        number = self.layout.number_of(request_id)
        following.add(request_id, start)
        with self._reaching():
            record = self.layout.keys[number].record(request_id)
            row: Any = yield Call(number, "hmget", (record, ["state", "offset", "reply"]))
        state, offset, reply_to = row
        check_position(request_id, start, state, offset)
        if reply_to:
            remedy = "read its result, or the replies of that name"
            raise InvalidRequest("reply_to", "'' to be followed", reply_to.decode(), remedy)

    def result(self, request_id: str, timeout_s: float | None) -> Steps[Result]:
        number = self.layout.number_of(request_id)
        keys = self.layout.keys[number]
        with self._reaching():
            reply_to: Any = yield Call(number, "hget", (keys.record(request_id), "reply"))
        if reply_to:
            replies = keys.reply(reply_to.decode())
            return (yield from self._replied(request_id, replies, timeout_s))
        ends_at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        following = Following(self.layout)
        yield from self.follow(following, request_id, 0)
        deltas: list[Delta] = []
        while len(following):
            left = ends_at - time.monotonic()
            polled = yield from following.polled(max(left, 0.0))
            # One read takes a part of a long output: only an empty one shows that there is no more.
            if left <= 0 and not polled:
                raise _late(request_id, timeout_s)
            deltas += polled
        return Result.of(deltas)

    def _replied(self, request_id: str, replies: str, timeout_s: float | None) -> Steps[Result]:
        ends_at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        silence = Silence()
        while True:
            left = ends_at - time.monotonic()
            try:
                with self._reaching():
                    result = yield from self._reply_or_wait(request_id, replies, left)
            except ServerUnreachable as error:  # waited for, as when following
                result = None
                yield silence.lost(error, left)
            else:
                silence.back()
            if result is not None:
                return result
            if left <= 0:
                raise _late(request_id, timeout_s)

    def _reply_or_wait(self, request_id: str, replies: str, left_s: float) -> Steps[Result | None]:
        """The reply, or None after a wait for anything new in its stream."""
        number = self.layout.number_of(request_id)
        newest: Any = yield Call(number, "xrevrange", (replies, "+", "-", 1))
        result = yield from ended_result(self.layout, request_id)
        if result is None and left_s > 0:
            block_ms = max(int(min(left_s, MAX_BLOCK_S) * 1000), 1)
            after = newest[0][0].decode() if newest else "0-0"
            yield Read({replies: after}, 1, block_ms)
        return result

    def cancel(self, request_id: str) -> Steps[bool]:
        number = self.layout.number_of(request_id)
        with self._reaching():
            tag = self.layout.keys[number].tag
            reply = yield from _CANCEL.steps(number, tag, [request_id])
        if reply == b"NONE":
            raise NotFound(f"no request {request_id} in queue {self.queue}, or its result expired")
        return bool(reply == b"OK")

    def live(self) -> Steps[int]:
        total = 0
        with self._reaching():
            for keys in self.layout.keys:
                total += yield Call(keys.shard, "zcard", (keys.live,))
        return total

    def forget(self, request_ids: Sequence[str], within_s: float) -> Steps[None]:
        for number, ids in self.layout.split((item, item) for item in request_ids).items():
            tag = self.layout.keys[number].tag
            for first in range(0, len(ids), _FORGET_BATCH):
                some = ids[first : first + _FORGET_BATCH]
                with self._reaching():
                    yield from _FORGET.steps(number, tag, [int(within_s * 1000), *some])

    def workers(self) -> Steps[list[WorkerInfo]]:
        keys = self.layout.keys[0]  # each serves all shards
        with self._reaching():
            seconds, micros = yield Call(0, "time")
            now_ms = seconds * 1000 + micros // 1000
            names: Any = yield Call(0, "zrangebyscore", (keys.workers, now_ms, "+inf"))
            ids = [name.decode() for name in names]
            calls = tuple(("hgetall", (keys.worker(worker_id),)) for worker_id in ids)
            rows: list[Any] = yield Calls(0, calls)
        return [_worker(name, row) for name, row in zip(ids, rows, strict=True) if b"pid" in row]

    def _enqueue(self, number: int, batch: list[tuple[Request, bytes]], before: int) -> Steps[None]:
        arguments: list[str | bytes | int] = [int(self.clock() * 1000)]
        for request, payload in batch:
            arguments += (request.request_id, request.fingerprint, payload, request.tenant)
            arguments += (request.priority, request.deadline_ms, request.prompt_cost)
            arguments += (request.params.max_tokens, request.reply_to)
        with self._reaching():
            tag = self.layout.keys[number].tag
            *replies, retry_ms = yield from _ENQUEUE.steps(number, tag, arguments)
        for index, (reply, (request, _)) in enumerate(zip(replies, batch, strict=True)):
            if reply == b"CONFLICT":
                expected = "a new id, or that of a request with the same content"
                raise Conflict("request_id", expected, request.request_id, "choose another id")
            if reply in (b"BUSY", b"QUOTA"):
                what = f"queue {self.queue}"
                if reply == b"QUOTA":
                    what = f"the quota of tenant {request.tenant} in {what}"
                raise _busy(what, before + index, retry_ms / 1000)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (RedisConnectionError, RedisTimeoutError) as error:
            shown = self._url
            raise ServerUnreachable(f"{shown} does not answer: {error}; is it running?") from error
        except OutOfMemoryError as error:
            text = f"queue {self.queue}: the server is out of memory; drain it or raise maxmemory"
            raise Busy(text, 5.0) from error
        except NoPermissionError as error:
            remedy = "give this user the rights of a producer"
            raise WrongServer(f"{self._url} refuses us: {error}; {remedy}") from error
        except ResponseError as error:
            if not is_about_the_server(error):
                raise
            text = f"{self._url} cannot do this now: {error}; repeat the call"
            raise ServerUnreachable(text) from error


def _busy(what: str, accepted: int, retry_after_s: float) -> Busy:
    text = f"{what} is full: {accepted} requests of this call were accepted"
    remedy = f"repeat the call after {retry_after_s:.1f} s, or have the limit raised"
    return Busy(f"{text}; {remedy}", retry_after_s)


def _late(request_id: str, timeout_s: float | None) -> TimeoutError:
    return TimeoutError(f"request {request_id} has not ended within {timeout_s or 0:g} s")


def _batches(requests: Iterable[Request], most: int) -> Iterator[list[tuple[Request, bytes]]]:
    batch: list[tuple[Request, bytes]] = []
    size = 0
    for request in requests:
        payload = request.pack()
        if batch and (len(batch) == most or size + len(payload) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((request, payload))
        size += len(payload)
    if batch:
        yield batch


def _worker(worker_id: str, row: Mapping[bytes, bytes]) -> WorkerInfo:
    fields = {name.decode(): value.decode() for name, value in row.items()}
    return WorkerInfo(
        worker_id=worker_id,
        model=fields["model"],
        host=fields["host"],
        pid=int(fields["pid"]),
        started_ms=int(fields["started_ms"]),
        version=fields.get("version", ""),
        adapters=tuple(json.loads(fields.get("adapters", "[]"))),
        quantization=fields.get("quantization", ""),
        kv_cache_dtype=fields.get("kv_cache_dtype", ""),
    )
