"""`Client`: submit requests, follow their tokens, gather results, cancel."""

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.exchange import KEPT_S, AnyPrompt, Exchange
from tokenmill.producer.follower import Follower
from tokenmill.producer.replies import Replies
from tokenmill.producer.shards import Shards
from tokenmill.producer.steps import Steps, run
from tokenmill.producer.transport import Transport
from tokenmill.producer.window import Window
from tokenmill.producer.wire import Delta, Request, Result, WorkerInfo

REDIS_URL = "TOKENMILL_REDIS_URL"

_Outcome = TypeVar("_Outcome")


class Client:
    """A producer's side of a queue. Threads may share it; close it, or use it in a `with`.

    Raises:
        ServerUnreachable, WrongServer, InvalidRequest: as for `connect`.
    """

    def __init__(
        self, url: str | None = None, *, queue: str = "default", tenant: str = "default"
    ) -> None:
        """Connect to `url`, else to `TOKENMILL_REDIS_URL`, else to the embedded server."""
        self.url = url or os.environ.get(REDIS_URL) or embedded_url()
        self._shards = Shards(self.url, queue)
        self._exchange = Exchange(self._shards, url=self.url, tenant=tenant)
        self.queue = queue
        self.tenant = tenant

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; submitted requests run on."""
        self._shards.close()

    def new_request(self, prompt: AnyPrompt, **fields: Any) -> Request:
        """Build and check a request without sending it.

        `fields`: model, priority, request_id, tools, deadline_s, metadata, reply_to, and the
        fields of SamplingParams. With `reply_to` its whole output becomes one entry of
        `replies(reply_to)`, which costs a fraction of a stream of deltas; it cannot be followed.

        Raises:
            InvalidRequest: a field out of bounds.
        """
        return self._exchange.new_request(prompt, **fields)

    def id_for(self, key: str) -> str:
        """The request id of an idempotency key of any form: the same key gives the same id."""
        return self._exchange.id_for(key)

    def new_choices(self, prompt: AnyPrompt, *, n: int, **fields: Any) -> list[Request]:
        """Build n requests for n outputs of one prompt, each with a seed of its own.

        The first is what `new_request` would build; the ids of the others follow from its id, so
        that repeating the call with a `request_id` gives the same requests.

        Raises:
            InvalidRequest: a field out of bounds.
        """
        return self._exchange.new_choices(prompt, n=n, **fields)

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
        return self._run(self._exchange.submit_many(requests))

    def follow(self, request_id: str, *, start: int = 0) -> Iterator[Delta]:
        """Deltas from the token offset `start` (0, or the `end` of a delta) to the last one.

        Blocks between them, and goes on by itself after a lost connection.

        Raises:
            NotFound: no such request. InvalidRequest: it ended before `start`, or has a `reply_to`.
            OutputChanged: the server has lost part of what was read, and it came out otherwise.
        """
        follower = self.follower()
        self._run(self._exchange.follow(follower, request_id, start))
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
        return Replies(self._exchange, Transport(self._shards), name)

    def result(self, request_id: str, *, timeout_s: float | None = None) -> Result:
        """Wait for the whole output, however it ends.

        Raises:
            NotFound: no such request, or its reply was taken by a reader of its stream.
            TimeoutError: it has not ended within `timeout_s`.
        """
        return self._run(self._exchange.result(request_id, timeout_s))

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
        return Window(self._exchange, requests, replies, size=window, ordered=ordered).results()

    def cancel(self, request_id: str) -> bool:
        """Stop a request; False if it had ended otherwise. A running one stops within a flush.

        Raises:
            NotFound: no such request.
        """
        return self._run(self._exchange.cancel(request_id))

    @property
    def num_shards(self) -> int:
        """How many shards the queue has: the ids of requests begin with the number of one."""
        return self._shards.count

    def live(self) -> int:
        """How many requests of the queue, of all producers, have not ended."""
        return self._run(self._exchange.live())

    def forget(self, request_ids: Sequence[str], *, within_s: float = KEPT_S) -> None:
        """Let the server drop outputs that were kept elsewhere, sooner than it would.

        Only what has ended other than as error is dropped: dead letters may be tried again.
        """
        self._run(self._exchange.forget(request_ids, within_s))

    def workers(self) -> list[WorkerInfo]:
        """The workers whose lease has not run out."""
        return self._run(self._exchange.workers())

    def _run(self, steps: Steps[_Outcome]) -> _Outcome:
        return run(steps, Transport(self._shards))


def _deltas(follower: Follower) -> Iterator[Delta]:
    while len(follower):
        yield from follower.poll(MAX_BLOCK_S)


def embedded_url() -> str:
    """The URL of the embedded server, started if it does not run."""
    from tokenmill.producer.embedded import ensure_server

    return ensure_server()
