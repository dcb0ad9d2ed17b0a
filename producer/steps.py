"""`Steps`: an operation of the protocol without a connection.

A generator yields one thing to do at a time, is sent the reply to it or has its error thrown in,
and returns the outcome. `run` does these things one after the other in this thread, and
`arun` awaits them, so that both clients share every operation.
"""

from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

_Effect = TypeVar("_Effect")
_Outcome = TypeVar("_Outcome")


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the client library, on the connection to one shard."""

    shard: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Calls:
    """Several of one shard in one round trip; the reply is a list of theirs."""

    shard: int
    #: Methods and their arguments.
    calls: tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True, slots=True)
class Read:
    """A blocking read of streams of any shards: the entries after the given ids."""

    streams: Mapping[Any, Any]
    count: int
    block_ms: int


@dataclass(frozen=True, slots=True)
class Sleep:
    """A pause."""

    seconds: float


Effect: TypeAlias = Call | Calls | Read | Sleep
Steps: TypeAlias = Generator[Effect, Any, _Outcome]


def run(steps: Generator[_Effect, Any, _Outcome], perform: Callable[[_Effect], Any]) -> _Outcome:
    """Do what the steps ask for, and return their outcome."""
    try:
        effect = next(steps)
        while True:
            try:
                reply = perform(effect)
            except Exception as error:  # noqa: BLE001 - it is raised where it is expected
                effect = steps.throw(error)
            else:
                effect = steps.send(reply)
    except StopIteration as end:
        outcome: _Outcome = end.value
        return outcome
    finally:
        steps.close()


async def arun(
    steps: Generator[_Effect, Any, _Outcome], perform: Callable[[_Effect], Awaitable[Any]]
) -> _Outcome:
    """The same, where doing something is to be awaited."""
    try:
        effect = next(steps)
        while True:
            try:
                reply = await perform(effect)
            except Exception as error:  # noqa: BLE001 - it is raised where it is expected
                effect = steps.throw(error)
            else:
                effect = steps.send(reply)
    except StopIteration as end:
        outcome: _Outcome = end.value
        return outcome
    finally:
        steps.close()
