"""`Client`: submit requests, follow their tokens, gather results, cancel."""

import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tokenmill.producer.address import shown_url
from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import (
    Busy,
    Conflict,
    InvalidRequest,
    NotFound,
    ServerUnreachable,
    WrongServer,
)
from tokenmill.producer.follower import Follower, check_position
from tokenmill.producer.params import SamplingParams, check_choices, choice_seed, derived_seed
from tokenmill.producer.refusals import is_about_the_server
from tokenmill.producer.replies import Replies, ended_result
from tokenmill.producer.request_id import new_request_id, request_id_for
from tokenmill.producer.scripts import Script
from tokenmill.producer.shards import Shards
from tokenmill.producer.window import Window
from tokenmill.producer.wire import (
    Delta,
    Message,
    Request,
    Result,
    WorkerInfo,
    check_name,
)

REDIS_URL = "TOKENMILL_REDIS_URL"
MAX_DEADLINE_S = 30 * 86_400
#: One enqueue call: at most so many requests and about so many bytes.
_BATCH = 64
_BATCH_BYTES = 4 * 2**20

#: Ids of one call that forgets.
_FORGET_BATCH = 256

_ENQUEUE = Script("tokenmill.producer", "enqueue")
_CANCEL = Script("tokenmill.producer", "cancel")
_FORGET = Script("tokenmill.producer", "forget")

#: A prompt as users write it.
AnyPrompt = str | Sequence[int] | Sequence[Mapping[str, str]] | Sequence[Message]


class Client:
    """A producer's side of a queue. Threads may share it; close it, or use it in a `with`.

    Raises:
        ServerUnreachable, WrongServer, InvalidRequest: as for `connect`.
    """

    def __init__(
        self, url: str | None = None, *, queue: str = "default", tenant: str = "default"
    ) -> None:
        """Connect to `url`, else to `TOKENMILL_REDIS_URL`, else to the embedded server."""
        self.queue = queue
        self.tenant = check_name("tenant", tenant)
        self.url = url or os.environ.get(REDIS_URL) or _embedded()
        self._shards = Shards(self.url, queue)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; submitted requests run on."""
        self._shards.close()

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
                "deadline_ms": int((time.time() + deadline_s) * 1000),
                "metadata": metadata or {},
                "reply_to": reply_to,
            }
        )
        self._shards.number_of(request.request_id)  # checks it
        request.pack()  # its size is checked here rather than among others in submit_many
        return request

    def _new_id(self) -> str:
        return new_request_id(self._shards.any_number())

    def id_for(self, key: str) -> str:
        """The request id of an idempotency key of any form: the same key gives the same id."""
        return request_id_for(key, self._shards.number_for(key))

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

    def submit(self, prompt: AnyPrompt, **fields: Any) -> str:
        """Enqueue one request and return its id; `fields` as for `new_request`.

        With a `request_id`, repeating the call is a no-op.

        Raises:
            InvalidRequest: a field out of bounds; Conflict: the id has another content.
            Busy: the queue is full. ServerUnreachable: nothing answered; repeating with the same
                `request_id` is safe.
        """
        return self.submit_many([self.new_request(prompt, **fields)])[0]

    def submit_many(self, requests: Iterable[Request]) -> list[str]:
        """Enqueue requests in batches and return their ids; repeating the call is a no-op.

        Raises:
            Busy, Conflict, InvalidRequest: for one of them; those before it are enqueued, others
                may be.
        """
        ids: list[str] = []
        for batch in _batches(requests, _BATCH * self._shards.count):
            parts = self._shards.split((item[0].request_id, item) for item in batch)
            accepted = len(ids)
            for number, part in parts.items():
                for first in range(0, len(part), _BATCH):
                    some = part[first : first + _BATCH]
                    self._enqueue(number, some, accepted)
                    accepted += len(some)
            ids += (request.request_id for request, _ in batch)
        return ids

    def follow(self, request_id: str, *, start: int = 0) -> Iterator[Delta]:
        """Deltas from the token offset `start` (0, or the `end` of a delta) to the last one.

        Blocks between them, and goes on by itself after a lost connection.

        Raises:
            NotFound: no such request. InvalidRequest: it ended before `start`, or has a `reply_to`.
            OutputChanged: the server has lost part of what was read, and it came out otherwise.
        """
        follower = self.follower()
        follower.add(request_id, start)
        with self._reaching():
            record = self._shards.keys_of(request_id).record(request_id)
            server = self._shards.server_of(request_id)
            row: Any = server.hmget(record, "state", "offset", "reply")
        state, offset, reply_to = row
        check_position(request_id, start, state, offset)
        if reply_to:
            remedy = "read its result, or the replies of that name"
            raise InvalidRequest("reply_to", "'' to be followed", reply_to.decode(), remedy)
        return _deltas(follower)

    def follow_many(self, request_ids: Iterable[str]) -> Iterator[Delta]:
        """Deltas of many requests as they come, each request's in order, until all have ended."""
        follower = self.follower()
        for request_id in request_ids:
            follower.add(request_id)
        return _deltas(follower)

    def follower(self) -> Follower:
        """A new, empty `Follower` on this client's connections."""
        return Follower(self._shards)

    def replies(self, name: str) -> Replies:
        """A reader of the outputs of all requests with this `reply_to`."""
        return Replies(self._shards, name, self.forget)

    def result(self, request_id: str, *, timeout_s: float | None = None) -> Result:
        """Wait for the whole output, however it ends.

        Raises:
            NotFound: no such request, or its reply was taken by a reader of its stream.
            TimeoutError: it has not ended within `timeout_s`.
        """
        keys, server = self._shards.keys_of(request_id), self._shards.server_of(request_id)
        with self._reaching():
            reply_to: Any = server.hget(keys.record(request_id), "reply")
        if reply_to:
            return self._replied(request_id, keys.reply(reply_to.decode()), timeout_s)
        ends_at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self.follow(request_id)  # checks the id
        follower = self.follower()
        follower.add(request_id)
        deltas: list[Delta] = []
        while len(follower):
            left = ends_at - time.monotonic()
            polled = follower.poll(max(left, 0.0))
            # One read takes a part of a long output: only an empty one shows that there is no more.
            if left <= 0 and not polled:
                raise _late(request_id, timeout_s)
            deltas += polled
        return Result.of(deltas)

    def _replied(self, request_id: str, replies: str, timeout_s: float | None) -> Result:
        ends_at = math.inf if timeout_s is None else time.monotonic() + timeout_s
        number = self._shards.number_of(request_id)
        keys, server = self._shards.keys[number], self._shards.server(number)
        while True:
            with self._reaching():
                newest: Any = server.xrevrange(replies, count=1)
                result = ended_result(server, keys, request_id)
                left = ends_at - time.monotonic()
                if result is not None:
                    return result
                if left <= 0:
                    raise _late(request_id, timeout_s)
                block_ms = max(int(min(left, MAX_BLOCK_S) * 1000), 1)
                after: Any = {replies: newest[0][0] if newest else "0-0"}
                self._shards.blocking(number).xread(after, count=1, block=block_ms)

    def map(
        self,
        prompts: Iterable[AnyPrompt],
        *,
        window: int = 256,
        ordered: bool = False,
        **fields: Any,
    ) -> Iterator[Result]:
        """Results of many prompts, as they end or in order; `fields` as for `new_request`.

        At most `window` requests are unfinished or not yet taken; leaving the loop cancels them.
        """
        if window < 1:
            raise InvalidRequest("window", "at least 1", window)
        name = f"map-{secrets.token_hex(8)}"
        requests = (self.new_request(prompt, reply_to=name, **fields) for prompt in prompts)
        replies = self.replies(name)
        return Window(self, requests, replies, size=window, ordered=ordered).results()

    def cancel(self, request_id: str) -> bool:
        """Stop a request; False if it had ended otherwise. A running one stops within a flush.

        Raises:
            NotFound: no such request.
        """
        tag, server = self._shards.keys_of(request_id).tag, self._shards.server_of(request_id)
        with self._reaching():
            reply = _CANCEL(server, tag, [request_id])
        if reply == b"NONE":
            raise NotFound(f"no request {request_id} in queue {self.queue}, or its result expired")
        return bool(reply == b"OK")

    @property
    def num_shards(self) -> int:
        """How many shards the queue has: the ids of requests begin with the number of one."""
        return self._shards.count

    def live(self) -> int:
        """How many requests of the queue, of all producers, have not ended."""
        with self._reaching():
            return sum(int(server.zcard(keys.live)) for keys, server in self._shards)

    def forget(self, request_ids: Sequence[str], *, within_s: float = 600) -> None:
        """Let the server drop outputs that were kept elsewhere, sooner than it would.

        Only what has ended other than as error is dropped: dead letters may be tried again.
        """
        for number, ids in self._shards.split((item, item) for item in request_ids).items():
            tag, server = self._shards.keys[number].tag, self._shards.server(number)
            for first in range(0, len(ids), _FORGET_BATCH):
                some = ids[first : first + _FORGET_BATCH]
                with self._reaching():
                    _FORGET(server, tag, [int(within_s * 1000), *some])

    def workers(self) -> list[WorkerInfo]:
        """The workers whose lease has not run out."""
        keys, server = self._shards.keys[0], self._shards.server(0)  # each serves all shards
        with self._reaching():
            seconds, micros = server.time()
            now_ms = seconds * 1000 + micros // 1000
            names: Any = server.zrangebyscore(keys.workers, now_ms, "+inf")
            ids = [name.decode() for name in names]
            rows: list[Any] = [server.hgetall(keys.worker(name)) for name in ids]
        return [_worker(name, row) for name, row in zip(ids, rows, strict=True) if b"pid" in row]

    def _enqueue(self, number: int, batch: list[tuple[Request, bytes]], before: int) -> None:
        server = self._shards.server(number)
        arguments: list[str | bytes | int] = []
        for request, payload in batch:
            arguments += (request.request_id, request.fingerprint, payload, request.tenant)
            arguments += (request.priority, request.deadline_ms, request.prompt_cost)
            arguments += (request.params.max_tokens, request.reply_to)
        with self._reaching():
            *replies, retry_ms = _ENQUEUE(server, self._shards.keys[number].tag, arguments)
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
            shown = shown_url(self.url)
            raise ServerUnreachable(f"{shown} does not answer: {error}; is it running?") from error
        except OutOfMemoryError as error:
            text = f"queue {self.queue}: the server is out of memory; drain it or raise maxmemory"
            raise Busy(text, 5.0) from error
        except NoPermissionError as error:
            remedy = "give this user the rights of a producer"
            raise WrongServer(f"{shown_url(self.url)} refuses us: {error}; {remedy}") from error
        except ResponseError as error:
            if not is_about_the_server(error):
                raise
            text = f"{shown_url(self.url)} cannot do this now: {error}; repeat the call"
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


def _deltas(follower: Follower) -> Iterator[Delta]:
    while len(follower):
        yield from follower.poll(MAX_BLOCK_S)


def _worker(worker_id: str, row: Mapping[bytes, bytes]) -> WorkerInfo:
    fields = {name.decode(): value.decode() for name, value in row.items()}
    return WorkerInfo(
        worker_id=worker_id,
        model=fields["model"],
        host=fields["host"],
        pid=int(fields["pid"]),
        started_ms=int(fields["started_ms"]),
        version=fields.get("version", ""),
    )


def _embedded() -> str:
    from tokenmill.producer.embedded import ensure_server

    return ensure_server()
