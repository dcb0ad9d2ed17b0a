"""`AsyncClient`: what `Client` does, for asyncio.

    async with AsyncClient("redis://localhost:6379/0") as client:
        request = await client.submit("Why is the sky blue?", max_tokens=64)
        async for delta in client.follow(request):
            print(delta.text, end="", flush=True)

Both perform the same steps (`exchange`, `following`, `collecting`, `window`), which are awaited
here.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import Any, Self, TypeVar, cast

from tokenmill.producer.arriving import Arriving
from tokenmill.producer.async_shards import AsyncShards, AsyncTransport
from tokenmill.producer.client import REDIS_URL, embedded_url
from tokenmill.producer.collecting import Collecting
from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.exchange import KEPT_S, AnyPrompt, Exchange
from tokenmill.producer.following import Following
from tokenmill.producer.steps import Steps, arun
from tokenmill.producer.window import Sliding
from tokenmill.producer.wire import Delta, Request, Result, WorkerInfo, check_name

#: While a source of prompts is slow: how long an answer is waited for before it is looked at again.
SLOW_S = 0.05

_Outcome = TypeVar("_Outcome")


class AsyncFollower(Following):
    """As `Follower`; one task at a time. Close it, on a cluster it keeps connections."""

    def __init__(self, shards: AsyncShards) -> None:
        super().__init__(shards)
        self._perform = AsyncTransport(shards)

    async def poll(self, timeout_s: float) -> list[Delta]:
        """As `Follower.poll`."""
        return await arun(self.polled(timeout_s), self._perform)

    async def aclose(self) -> None:
        """Give up what is being read."""
        await self._perform.aclose()


class AsyncReplies(Collecting):
    """As `Replies`; one task at a time. Close it, on a cluster it keeps connections."""

    def __init__(self, exchange: Exchange, perform: AsyncTransport, name: str) -> None:
        super().__init__(exchange.layout, name)
        self.perform = perform
        self._exchange = exchange

    async def poll(self, timeout_s: float) -> list[Result]:
        """As `Replies.poll`."""
        return await arun(self.polled(timeout_s), self.perform)

    async def done(self, request_ids: Iterable[str]) -> None:
        """As `Replies.done`."""
        await arun(self._exchange.forget(tuple(request_ids), KEPT_S), self.perform)

    async def aclose(self) -> None:
        """Give up what is being read."""
        await self.perform.aclose()


class AsyncSliding(Sliding):
    """A window on a source that may be asynchronous."""

    def _has_more(self) -> bool:
        return isinstance(self._requests, Arriving) and not self._requests.is_over

    def _patience_s(self) -> float:
        """Short while the source is slow: what it gives must not wait for an answer."""
        is_slow = self._more and isinstance(self._requests, Arriving)
        return SLOW_S if is_slow and len(self._results) < self._size else MAX_BLOCK_S


class AsyncClient:
    """A producer's side of a queue, for the tasks of one event loop; use it in an `async with`.

    A task may be cancelled anywhere: what it had submitted stays so, and `map` cancels what it had
    in flight. Arguments, results and errors are those of `Client`.
    """

    def __init__(
        self, url: str | None = None, *, queue: str = "default", tenant: str = "default"
    ) -> None:
        """Of `url`, else `TOKENMILL_REDIS_URL`, else the embedded server: `open` connects."""
        self.url = url or os.environ.get(REDIS_URL) or ""
        self.queue = queue
        self.tenant = check_name("tenant", tenant)
        self._shards: AsyncShards | None = None
        self._opening = asyncio.Lock()

    async def open(self) -> Self:
        """Connect; `async with` does it.

        Raises:
            ServerUnreachable, WrongServer, InvalidRequest: as for `connect`.
        """
        async with self._opening:
            if self._shards is None:
                self.url = self.url or await asyncio.to_thread(embedded_url)
                self._shards = await AsyncShards.open(self.url, self.queue)
        return self

    async def aclose(self) -> None:
        """Close the connections; submitted requests run on."""
        shards, self._shards = self._shards, None
        if shards:
            await shards.aclose()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    def new_request(self, prompt: AnyPrompt, **fields: Any) -> Request:
        """As `Client.new_request`."""
        return self._exchange.new_request(prompt, **fields)

    def id_for(self, key: str) -> str:
        """As `Client.id_for`."""
        return self._exchange.id_for(key)

    def new_choices(self, prompt: AnyPrompt, *, n: int, **fields: Any) -> list[Request]:
        """As `Client.new_choices`."""
        return self._exchange.new_choices(prompt, n=n, **fields)

    @property
    def num_shards(self) -> int:
        """As `Client.num_shards`."""
        return self._open_shards.count

    async def submit(self, prompt: AnyPrompt, **fields: Any) -> str:
        """As `Client.submit`."""
        return (await self.submit_many([self.new_request(prompt, **fields)]))[0]

    async def submit_many(self, requests: Iterable[Request]) -> list[str]:
        """As `Client.submit_many`."""
        return await self._run(self._exchange.submit_many(requests))

    async def follow(self, request_id: str, *, start: int = 0) -> AsyncIterator[Delta]:
        """As `Client.follow`; what it raises comes with the first delta."""
        follower = self.follower()
        await self._run(self._exchange.follow(follower, request_id, start))
        async for delta in _deltas(follower):
            yield delta

    async def follow_many(self, request_ids: Iterable[str]) -> AsyncIterator[Delta]:
        """As `Client.follow_many`."""
        follower = self.follower()
        for request_id in request_ids:
            follower.add(request_id)
        async for delta in _deltas(follower):
            yield delta

    def follower(self) -> AsyncFollower:
        """A new, empty follower on this client's connections."""
        return AsyncFollower(self._open_shards)

    def replies(self, name: str) -> AsyncReplies:
        """As `Client.replies`."""
        return AsyncReplies(self._exchange, AsyncTransport(self._open_shards), name)

    async def result(self, request_id: str, *, timeout_s: float | None = None) -> Result:
        """As `Client.result`."""
        return await self._run(self._exchange.result(request_id, timeout_s))

    async def map(
        self,
        prompts: Iterable[AnyPrompt] | AsyncIterable[AnyPrompt],
        *,
        window: int = 256,
        ordered: bool = False,
        **fields: Any,
    ) -> AsyncIterator[Result]:
        """As `Client.map`, of an asynchronous iterable too.

        A loop that is left early is closed by `aclose`, as all generators.
        """
        if window < 1:
            raise InvalidRequest("window", "at least 1", window)
        name = f"map-{secrets.token_hex(8)}"

        def build(prompt: AnyPrompt) -> Request:
            return self.new_request(prompt, reply_to=name, **fields)

        replies = self.replies(name)
        arriving = Arriving(prompts, build) if isinstance(prompts, AsyncIterable) else None
        requests = arriving or (build(prompt) for prompt in cast(Iterable[AnyPrompt], prompts))
        sliding = AsyncSliding(self._exchange, requests, replies, size=window, ordered=ordered)
        try:
            while sliding:
                cancellations = _cancellations()
                if arriving and sliding.is_idle:  # there is nothing else to wait for
                    await arriving.wait()
                await arun(sliding.turn(), replies.perform)
                # One that comes as a read ends may be lost in the client library.
                if _cancellations() > cancellations:
                    raise asyncio.CancelledError
                for result in sliding.take():
                    yield result
            await arun(sliding.end(), replies.perform)
        finally:
            if arriving:
                await arriving.aclose()
            await arun(sliding.cancel(), replies.perform)
            await replies.aclose()

    async def cancel(self, request_id: str) -> bool:
        """As `Client.cancel`."""
        return await self._run(self._exchange.cancel(request_id))

    async def live(self) -> int:
        """As `Client.live`."""
        return await self._run(self._exchange.live())

    async def forget(self, request_ids: Sequence[str], *, within_s: float = KEPT_S) -> None:
        """As `Client.forget`."""
        await self._run(self._exchange.forget(request_ids, within_s))

    async def workers(self) -> list[WorkerInfo]:
        """As `Client.workers`."""
        return await self._run(self._exchange.workers())

    async def _run(self, steps: Steps[_Outcome]) -> _Outcome:
        perform = AsyncTransport(self._open_shards)
        try:
            return await arun(steps, perform)
        finally:
            await perform.aclose()

    @property
    def _open_shards(self) -> AsyncShards:
        if self._shards is None:
            expected = "open: use it in an `async with`, or await its open()"
            raise InvalidRequest("client", expected, "a closed one")
        return self._shards

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self._open_shards, url=self.url, tenant=self.tenant)


def _cancellations() -> int:
    """How often this task was asked to end."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


async def _deltas(follower: AsyncFollower) -> AsyncIterator[Delta]:
    try:
        while len(follower):
            for delta in await follower.poll(MAX_BLOCK_S):
                yield delta
    finally:
        await follower.aclose()
