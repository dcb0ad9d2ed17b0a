"""Real servers for every test: Valkey from its wheel, and redis-server where it is installed.

A test with `server_url` runs on one server of each kind. Marked `everywhere` it runs behind
Sentinels and on a cluster too: on one kind each, and with `--all-servers` on both. Marked
`placed("sentinel")`, `placed("cluster")` or `placed("")` (one server) it runs there alone, on one
kind, and with `--all-servers` on both.
"""

import functools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from servers import (
    NO_REDIS,
    REDIS_SERVER,
    Certificates,
    Cluster,
    Replicated,
    Server,
    cluster,
    replicated,
    running,
)
from tokenmill.producer.client import Client
from tokenmill.producer.connection import connect
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import new_request_id
from tokenmill.producer.wire import Request, Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish, Queue

SINGLE = ("valkey", "redis")
ONE = ("redis",) if REDIS_SERVER else ("valkey",)
GROUPS = ("redis-sentinel", "valkey-cluster")
#: Directories whose tests run several processes each.
MANY_PROCESSES = ("chaos", "integration", "fuzz")
OTHER_GROUPS = ("valkey-sentinel", "redis-cluster")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-servers",
        action="store_true",
        help="run what is marked `everywhere` on Sentinels and clusters of both kinds",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server_kind" not in metafunc.fixturenames:
        return
    is_all = metafunc.config.getoption("--all-servers")
    groups = GROUPS + (OTHER_GROUPS if is_all else ())
    kinds: tuple[str, ...] = SINGLE
    if placed := metafunc.definition.get_closest_marker("placed"):
        choice = (*(SINGLE if is_all else ONE), *groups)
        kinds = tuple(kind for kind in choice if kind.partition("-")[2] in placed.args)
    elif metafunc.definition.get_closest_marker("everywhere"):
        kinds += groups
    marked = [
        pytest.param(kind, marks=_needs_redis if kind.startswith("redis") else ()) for kind in kinds
    ]
    metafunc.parametrize("server_kind", marked, indirect=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests, a file stays whole: what it makes is made once.

    What runs many servers and workers of its own goes to one process, one after the other: these
    start once, nobody takes their ports, and those who time them are not in each other's way.
    Marks of xdist_group do nothing with xdist 3.8 and pytest 9.2, whose items keep their ids.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            is_many = path.split("/")[1] in MANY_PROCESSES
            is_many = is_many or "-sentinel" in nodeid or "-cluster" in nodeid
            return "processes" if is_many else path

    return ByFile(config, log)


_needs_redis = pytest.mark.skipif(REDIS_SERVER is None, reason=NO_REDIS)


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
def _servers() -> Iterator[Callable[[str], Server | Replicated | Cluster]]:
    """What is shared by the whole run, of each kind, started when it is first asked for."""
    starters: dict[str, Any] = {"": running, "sentinel": replicated, "cluster": cluster}
    with ExitStack() as stack:

        def start(kind: str) -> Any:
            brand, _, place = kind.partition("-")
            return stack.enter_context(starters[place](brand))

        yield functools.cache(start)


@pytest.fixture
def server_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server in turn: valkey, redis, redis-sentinel and so on."""
    return str(request.param)


@pytest.fixture
def server_url(_servers: Callable[[str], Server | Replicated | Cluster], server_kind: str) -> str:
    """Empty servers, shared by the whole run. The default queue has one shard on a cluster too."""
    servers = _servers(server_kind)
    servers.flush()
    if isinstance(servers, Cluster):
        with connect(servers.url, key=Keys().tag) as server:
            server.set(Keys().shards, 1)
    return servers.url


@pytest.fixture
def own_server(server_kind: str) -> Iterator[Server]:
    """A server of this test alone, to be killed and started again."""
    with running(server_kind.partition("-")[0]) as server:
        yield server


@pytest.fixture
def own_sentinels(server_kind: str) -> Iterator[Replicated]:
    """A primary, replicas and Sentinels of this test alone."""
    with replicated(server_kind.partition("-")[0]) as servers:
        yield servers


@pytest.fixture
def own_cluster(server_kind: str) -> Iterator[Cluster]:
    """A cluster with replicas of this test alone."""
    with cluster(server_kind.partition("-")[0], replicas=1) as servers:
        yield servers


@pytest.fixture
def server_cluster(
    _servers: Callable[[str], Server | Replicated | Cluster], server_kind: str
) -> Cluster:
    """An empty cluster of three, shared by the whole run."""
    shared = _servers(f"{server_kind.partition('-')[0]}-cluster")
    assert isinstance(shared, Cluster)
    shared.flush()
    return shared


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of a CA, for a server and for a client."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    return Certificates(tmp_path_factory.mktemp("certificates")).make()


@pytest.fixture
def server(server_url: str) -> Iterator[redis.Redis]:
    """A connection to the shared server, on a cluster to the node of the default queue."""
    client = connect(server_url, key=Keys().tag)
    yield client
    client.close()


@pytest.fixture
def client(server_url: str) -> Iterator[Client]:
    with Client(server_url) as client:
        yield client


@pytest.fixture
def make_queue(server: redis.Redis, server_url: str) -> Iterator[Callable[..., Queue]]:
    """`make_queue("w1", lease_ms=...)`: a worker's side of the default queue."""
    blocking = connect(server_url, blocking=True, key=Keys().tag)

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
        with (
            connect(server_url, key=Keys().tag) as server,
            connect(server_url, blocking=True, key=Keys().tag) as blocking,
        ):
            queue = Queue(server, Keys(), "echo", blocking=blocking)
            while not stopped.is_set():
                queue.wait(0.02)
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
