"""`Portal`: an object of asyncio, called as if it blocked; what tests of both clients call."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Iterator
from typing import Any


class Portal:
    """Runs coroutines to their end and async generators item by item, all in one event loop."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self._target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if inspect.iscoroutinefunction(attribute):
            return lambda *args, **named: self._runner.run(attribute(*args, **named))
        if inspect.isasyncgenfunction(attribute):
            return lambda *args, **named: self._items(attribute(*args, **named))
        if name in ("follower", "replies"):
            return lambda *args: Portal(attribute(*args), self._runner)
        return attribute

    def __len__(self) -> int:
        return len(self._target)

    def _items(self, generator: AsyncGenerator[Any, None]) -> Iterator[Any]:
        try:
            while True:
                try:
                    item = self._runner.run(_next(generator))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self._runner.run(generator.aclose())


async def _next(generator: AsyncGenerator[Any, None]) -> Any:
    return await anext(generator)
