"""The scripted engine in this process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from scripted_engine import ScriptedEngine
from tokenmill.producer.client import Client
from tokenmill.producer.connection import connect
from tokenmill.worker.health import Pulse
from tokenmill.worker.inbox import Inbox
from tokenmill.worker.intake import Intake
from tokenmill.worker.loop import Loop
from tokenmill.worker.outage import Outage
from tokenmill.worker.publisher import Publisher
from tokenmill.worker.queue import Queue


@dataclass
class HandClock:
    """A clock that only moves when told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Parts:
    """A worker whose threads are turned by hand: nothing happens between two calls."""

    engine: ScriptedEngine
    queue: Queue
    clock: Any
    exit_when_idle_s: float | None = None
    alive: bool = True
    inbox: Inbox = field(default_factory=Inbox)
    outage: Outage = field(default_factory=Outage)

    def __post_init__(self) -> None:
        self.pulse = Pulse(60.0, self.clock)
        self.publisher = Publisher(
            self.queue, self.inbox, self.outage, is_alive=lambda: self.alive, clock=self.clock
        )
        self.intake = Intake(
            self.queue,
            self.inbox,
            self.publisher,
            self.outage,
            tokenizer=self.engine.tokenizer,
            model=self.engine.model_name,
            exit_when_idle_s=self.exit_when_idle_s,
            is_alive=lambda: self.alive,
            clock=self.clock,
        )
        self.loop = Loop(self.engine, self.inbox, self.intake, self.publisher, self.pulse)

    def claim(self) -> None:
        self.intake.offer(self.engine.capacity())
        self.intake.turn()

    def step(self, count: int = 1) -> None:
        """Iterations of the loop, each published; a flush interval passes between them."""
        for _ in range(count):
            assert self.loop.turn()
            self.clock.sleep(0.05)
            self.publisher.turn()


@pytest.fixture
def make_parts(make_queue: Callable[..., Queue]) -> Callable[..., Parts]:
    """`make_parts("w1", exit_when_idle_s=..., max_num_seqs=...)`, on a real server."""

    def make(
        worker_id: str = "w1",
        *,
        exit_when_idle_s: float | None = None,
        queue: Queue | None = None,
        **engine: Any,
    ) -> Parts:
        return Parts(
            ScriptedEngine(**engine),
            queue or make_queue(worker_id),
            HandClock(),
            exit_when_idle_s,
        )

    return make


@pytest.fixture
def spied_queue(make_queue: Callable[..., Queue]) -> Any:
    """A queue that notes each append and finish, and may lose answers or fail first."""
    return SpiedQueue(make_queue("w1"))


class SpiedQueue:
    """In front of a real queue. `faults` holds what the next calls raise; True: after the call."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.lease_ms = queue.lease_ms
        self.calls: list[tuple[str, Any]] = []
        self.faults: list[tuple[Exception, bool]] = []

    @property
    def num_inbox(self) -> int:
        return self._queue.num_inbox

    is_whole, is_reachable_in_part = True, False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._queue, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args[0] if args else kwargs))
            error, is_after = self.faults.pop(0) if self.faults else (None, False)
            if error and not is_after:
                raise error
            reply = method(*args, **kwargs)
            if error:
                raise error
            return reply

        return call


@pytest.fixture
def pair(server_url: str) -> Iterator[tuple[redis.Redis, redis.Redis]]:
    """The two connections of a worker."""
    server, blocking = connect(server_url), connect(server_url, blocking=True)
    yield server, blocking
    server.close()
    blocking.close()


@pytest.fixture
def output_of(client: Client) -> Callable[[str], Any]:
    """The result of a request that has ended."""
    return lambda request_id: client.result(request_id, timeout_s=5)
