"""A worker without a model: it answers through the real queue, a word a token."""

import asyncio
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from portal import Portal
from rows import write_rows
from tokenmill.producer import embedded
from tokenmill.producer.async_client import AsyncClient
from tokenmill.producer.client import Client
from tokenmill.producer.plan import Plan
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import Request, Usage, WorkerInfo, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish
from tokenmill.worker.shards import QueueLike, queue_of


@pytest.fixture(params=["blocking", "asyncio"])
def either_client(request: pytest.FixtureRequest, server_url: str) -> Iterator[Any]:
    """A `Client`, and an `AsyncClient` called as if it were one."""
    if request.param == "blocking":
        with Client(server_url) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        portal = Portal(runner.run(AsyncClient(server_url).open()), runner)
        yield portal
        portal.aclose()


@pytest.fixture(autouse=True)
def _no_share_left() -> Iterator[None]:
    """A test's share of an embedded server ends with it, as with a process."""
    yield
    while embedded._shares:
        embedded._shares.popitem()[1].close()


class FakeWorker(threading.Thread):
    """Says what it was asked, reversed, a word a token; refuses a prompt with the word REFUSE."""

    def __init__(self, url: str, *, model: str, limit: int, adapters: tuple[str, ...] = ()) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.model = model
        self.adapters = adapters
        #: Answers that it still gives; then it only keeps its lease.
        self.limit = limit
        self.answered = 0
        self.requests: list[Request] = []
        self.exhausted = threading.Event()
        self.ready = threading.Event()
        self.ended = threading.Event()

    def run(self) -> None:
        shards = Shards(self.url, "default")
        queue = queue_of(shards, f"fake-{time.monotonic_ns()}")
        info = WorkerInfo(
            worker_id=queue.worker_id,
            model=self.model,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_ms=1,
            adapters=self.adapters,
            quantization="int8",
            kv_cache_dtype="bfloat16",
        )
        queue.register(info)
        self.ready.set()
        while not self.ended.is_set():
            room = min(self.limit - self.answered, 64)
            claims = (
                queue.claim(sequences=room, tokens=10**6, kv_tokens=10**9, limit=room)
                if room > 0
                else []
            )
            for claim in claims:
                self._answer(queue, claim)
            if self.answered >= self.limit:
                self.exhausted.set()
                queue.renew()
            queue.wait(0.02)
        queue.retire()
        shards.close()

    def stop(self) -> None:
        self.ended.set()
        self.join(10)

    def _answer(self, queue: QueueLike, claim: Claim) -> None:
        prompt = claim.request.prompt
        last = prompt if isinstance(prompt, str) else prompt[-1]
        text = last if isinstance(last, str) else getattr(last, "content", str(last))
        words = text.split()[::-1][: claim.request.params.max_tokens]
        refused = "REFUSE" in words
        if refused:
            words = []
        ids = tuple(range(len(words)))
        pieces = [f"{word} " for word in words]
        half = len(ids) // 2
        if half:
            append = Append(
                request_id=claim.request_id,
                epoch=claim.epoch,
                start=0,
                token_ids=ids[:half],
                text="".join(pieces[:half]),
                digest=chain_digest("", ids[:half]),
            )
            queue.append([append])
        finish = Finish(
            request_id=claim.request_id,
            epoch=claim.epoch,
            start=half,
            token_ids=ids[half:],
            text="".join(pieces[half:]),
            digest=chain_digest("", ids),
            finish_reason="error" if refused else "stop",
            reason="refused, as asked" if refused else "",
            usage=Usage(prompt_tokens=len(text.split()), completion_tokens=len(ids)),
        )
        queue.finish([finish])
        self.requests.append(claim.request)
        self.answered += 1


@pytest.fixture
def fake_worker(server_url: str) -> Iterator[Callable[..., FakeWorker]]:
    """`fake_worker(model=, limit=, url=, adapters=)`: running, on the shared server at first."""
    workers: list[FakeWorker] = []

    def start(
        *,
        model: str = "fake",
        limit: int = 10**9,
        url: str = server_url,
        adapters: tuple[str, ...] = (),
    ) -> FakeWorker:
        worker = FakeWorker(url, model=model, limit=limit, adapters=adapters)
        worker.start()
        assert worker.ready.wait(10)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.stop()


@pytest.fixture
def kill() -> Callable[[int], None]:
    """`kill(pid)`: SIGKILL a process of any parent, and return when it is gone."""

    def killed(pid: int) -> None:
        with os.fdopen(os.pidfd_open(pid)) as ended:
            os.kill(pid, signal.SIGKILL)
            assert select.select([ended], [], [], 30)[0]

    return killed


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of this test alone, and no server named."""
    path = tmp_path / "state"
    monkeypatch.setenv("TOKENMILL_STATE_DIR", str(path))
    monkeypatch.delenv("TOKENMILL_REDIS_URL", raising=False)
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    def make(rows: list[Any] | None = None, **fields: Any) -> Plan:
        path = tmp_path / "in.jsonl"
        if rows is not None:
            write_rows(path, rows)
        return Plan(**{"input": str(path), "output": str(tmp_path / "out.jsonl")} | fields)

    return make


@pytest.fixture(params=["stream", "bulk"])
def delivery(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers token by token, and whole through one stream as in large runs."""
    monkeypatch.setattr("tokenmill.producer.run.BULK_ROWS", 0 if request.param == "bulk" else 1000)
