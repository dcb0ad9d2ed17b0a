"""`Arriving`: requests of an asynchronous source, as an iterator of those that have come."""

import asyncio
from collections.abc import AsyncIterable, Callable, Iterator

from tokenmill.producer.exchange import AnyPrompt
from tokenmill.producer.wire import Request

#: Requests that are taken from the source before there is room for them.
AHEAD = 64


class Arriving(Iterator[Request]):
    """`next` gives what has come, and StopIteration while there is nothing, or no more.

    A task takes prompts from the source while others wait for answers; close it in the end.
    """

    def __init__(
        self, prompts: AsyncIterable[AnyPrompt], build: Callable[[AnyPrompt], Request]
    ) -> None:
        self._come: asyncio.Queue[Request] = asyncio.Queue(AHEAD)
        #: Set while there is something for `wait`: a request, or the end.
        self._has_news = asyncio.Event()
        self._task = asyncio.ensure_future(self._take(prompts, build))
        self._task.add_done_callback(lambda _: self._has_news.set())

    def __next__(self) -> Request:
        if not self._come.empty():
            return self._come.get_nowait()
        if self._task.done():
            self._task.result()  # raises what the source has raised
        else:
            self._has_news.clear()
        raise StopIteration

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._task.done() and self._come.empty()

    async def wait(self) -> None:
        """Until something has come, or the source has ended."""
        await self._has_news.wait()

    async def aclose(self) -> None:
        """Take no more from the source."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # it was raised, or nobody is there any more to hear of it

    async def _take(
        self, prompts: AsyncIterable[AnyPrompt], build: Callable[[AnyPrompt], Request]
    ) -> None:
        async for prompt in prompts:
            await self._come.put(build(prompt))
            self._has_news.set()
