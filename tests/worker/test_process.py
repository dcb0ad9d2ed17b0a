"""A worker with all its threads: what stops it, and in which order; on a real server."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from redis.exceptions import OutOfMemoryError, ResponseError

from scripted_engine import ScriptedEngine, scripted_token
from tokenmill.producer.client import Client
from tokenmill.producer.errors import ServerUnreachable, WrongServer
from tokenmill.producer.keys import Keys
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import Delta, WorkerInfo
from tokenmill.worker import process
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.loop import EngineFailed
from tokenmill.worker.process import Worker, WorkerFailed, run

pytestmark = pytest.mark.placed("")

KEYS = Keys()


@dataclass
class Running:
    """A worker whose main thread is one of this test's."""

    worker: Worker
    thread: threading.Thread
    errors: list[Exception]

    def join(self, timeout_s: float = 10.0) -> None:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive()


@contextmanager
def running(url: str, engine: Any, **settings: Any) -> Iterator[Running]:
    config = WorkerConfig(model="scripted", redis_url=url, **settings)
    errors: list[Exception] = []
    with Shards(url, "default") as shards:
        worker = Worker(config, f"test-{id(errors)}", shards)

        def target() -> None:
            try:
                worker.run(engine)
            except (EngineFailed, WorkerFailed) as error:
                errors.append(error)

        started = Running(worker, threading.Thread(target=target), errors)
        started.thread.start()
        try:
            yield started
        finally:
            worker.stop()
            started.join()


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "tokenmill.worker"]


def epochs(result: Any) -> set[int]:
    return {token % 16 for token in result.token_ids}


def first_tokens(client: Client, request_id: str, count: int) -> list[Delta]:
    deltas: list[Delta] = []
    for delta in client.follow(request_id):
        deltas.append(delta)
        if delta.end >= count:
            break
    return deltas


@pytest.fixture
def record(server: redis.Redis) -> Callable[[str], dict[str, str]]:
    def read(request_id: str) -> dict[str, str]:
        fields: Any = server.hgetall(KEYS.record(request_id))
        return {k.decode(): v.decode("latin1") for k, v in fields.items()}

    return read


def test_it_serves_registers_and_retires(
    server_url: str, client: Client, server: redis.Redis
) -> None:
    engine = ScriptedEngine()
    with running(server_url, engine) as started:
        results = list(client.map([f"n{n}" for n in range(40)], max_tokens=5))
        assert [len(result.token_ids) for result in results] == [5] * 40
        (info,) = client.workers()
        assert (info.worker_id, info.model) == (started.worker.worker_id, "scripted")
        was_ready = started.worker.is_ready
    assert client.workers() == []
    assert (was_ready, started.worker.is_ready) == (True, False)
    assert engine.is_closed
    assert not server.exists(KEYS.own(info.worker_id))


def test_stop_releases_what_runs_and_what_waits(
    server_url: str, client: Client, record: Callable[[str], dict[str, str]]
) -> None:
    engine = ScriptedEngine(max_num_seqs=2, step_s=0.005)
    ids = [client.submit(f"n{n}", max_tokens=10_000) for n in range(4)]
    with running(server_url, engine) as started:
        first_tokens(client, ids[0], 5)
        asked_at = time.monotonic()
        started.worker.stop()
        started.join()
        assert time.monotonic() - asked_at < 3.0
    for request_id in ids:
        fields = record(request_id)
        assert (fields["state"], fields["attempts"]) == ("park", "0")
    assert int(record(ids[0])["offset"]) >= 5


def test_an_idle_worker_stops_at_once(server_url: str, server: redis.Redis) -> None:
    with running(server_url, ScriptedEngine()) as started:
        while not server.info("clients")["blocked_clients"]:
            assert started.thread.is_alive()
        asked_at = time.monotonic()
        started.worker.stop()
        started.join()
        assert time.monotonic() - asked_at < 0.9  # though it sleeps for 5 s at a time


def test_a_server_that_is_away_for_a_while_costs_nothing(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tokenmill.worker")
    engine = ScriptedEngine(step_s=0.002)
    with (
        Client(own_server.url) as client,
        running(own_server.url, engine) as started,
    ):
        request_id = client.submit("abc", max_tokens=200)
        first_tokens(client, request_id, 20)
        own_server.kill()
        while engine.has_work:  # it goes on generating
            assert started.thread.is_alive()
            time.sleep(0.002)  # the threads of the worker want the interpreter too
        own_server.start()
        result = client.result(request_id, timeout_s=20)
        assert (result.finish_reason, len(result.token_ids)) == ("length", 200)
        assert epochs(result) == {1}
        wanted = tuple(scripted_token(list(b"abc"), n, 1) for n in range(200))
        assert result.token_ids == wanted
    assert events(caplog).count("server_lost") == 1
    assert events(caplog).count("server_back") == 1


def test_a_drain_without_a_server_is_cut_short(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tokenmill.worker")
    with (
        Client(own_server.url) as client,
        running(own_server.url, ScriptedEngine(step_s=0.002), drain_s=1.0) as started,
    ):
        first_tokens(client, client.submit("abc", max_tokens=100_000), 5)
        own_server.kill()
        asked_at = time.monotonic()
        started.worker.stop()
        started.join()
        assert time.monotonic() - asked_at < 4.0
    assert "drain_cut_short" in events(caplog)


def test_an_engine_that_is_given_up_ends_the_worker_in_order(
    server_url: str, client: Client, record: Callable[[str], dict[str, str]]
) -> None:
    engine = ScriptedEngine(max_num_seqs=1, errors=[RuntimeError("broken")] * 100)
    ids = [client.submit(f"n{n}", max_tokens=5) for n in range(6)]
    with running(server_url, engine) as started:
        started.join()
        assert "3 requests in a row failed alone" in str(started.errors[0])
    assert client.workers() == []
    assert {record(request_id)["state"] for request_id in ids} <= {"park", "wait"}


def test_a_thread_that_ends_unexpectedly_ends_the_worker(
    server_url: str, client: Client, record: Callable[[str], dict[str, str]]
) -> None:
    engine = ScriptedEngine()

    def decode(token_ids: object) -> str:
        raise LookupError("a bug")

    engine.tokenizer.decode = decode  # type: ignore[method-assign]
    request_id = client.submit("abc", max_tokens=1000)
    with running(server_url, engine) as started:
        started.join()
        assert "LookupError: a bug" in str(started.errors[0])
    assert (record(request_id)["state"], record(request_id)["attempts"]) == ("park", "1")


class Panic(BaseException):
    """As pyo3's PanicException: no `Exception`."""


@pytest.mark.parametrize("name", ["intake", "publisher"])
def test_a_panic_in_a_thread_ends_the_worker(
    server_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def turn(_: object) -> None:
        raise Panic("byte 3 of 'Jane Doe'")

    monkeypatch.setattr(getattr(process, name.capitalize()), "run", turn)
    with running(server_url, ScriptedEngine()) as started:
        started.join()
        assert str(started.errors[0]).endswith("Panic")
    assert not started.worker.is_ready
    assert "thread_failed" in events(caplog)


def test_a_prompt_that_makes_the_tokenizer_panic_ends_alone(
    server_url: str, client: Client
) -> None:
    engine = ScriptedEngine()
    encode = engine.tokenizer.encode

    def encode_or_panic(text: str) -> list[int]:
        if text == "Jane Doe":
            raise Panic(text)
        return encode(text)

    engine.tokenizer.encode = encode_or_panic  # type: ignore[method-assign]
    with running(server_url, engine):
        bad, good = client.submit("Jane Doe"), client.submit("abc", max_tokens=3)
        assert client.result(good, timeout_s=10).ok
        result = client.result(bad, timeout_s=10)
    assert result.reason == "prompt cannot be tokenized: Panic"


def test_exit_when_idle(server_url: str, client: Client) -> None:
    with running(server_url, ScriptedEngine(), exit_when_idle_s=0.3) as started:
        assert client.result(client.submit("abc", max_tokens=3), timeout_s=5).ok
        started.join()
    assert client.workers() == []


def test_a_wrong_address_is_found_before_the_model_is_loaded() -> None:
    def make_engine(_: WorkerConfig) -> Any:
        pytest.fail("the model was loaded")

    config = WorkerConfig(model="m", redis_url="unix:///nowhere/at/all")
    with pytest.raises(ServerUnreachable, match="nowhere"):
        run(config, make_engine=make_engine)


def test_a_server_that_comes_later_is_waited_for(
    own_server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "tokenmill.worker")
    monkeypatch.setattr(process, "RETRY_S", 0.01)
    own_server.kill()
    config = WorkerConfig(model="scripted", redis_url=own_server.url, exit_when_idle_s=0.2)
    loaded: list[bool] = []

    def make_engine(_: WorkerConfig) -> Any:
        loaded.append("server_awaited" in events(caplog))
        own_server.start()
        return ScriptedEngine()

    assert run(config, make_engine=make_engine, waits_for_server=True) == 0
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    assert loaded == [True]  # without waiting for the server
    assert events(caplog).count("server_awaited") == 1
    assert "worker_ready" in events(caplog)


def test_a_worker_that_waits_to_register_is_alive(own_server: Any) -> None:
    config = WorkerConfig(model="scripted", redis_url=own_server.url, stall_limit_s=0.01)
    with Shards(own_server.url, "default") as shards:
        worker = Worker(config, "w", shards)
        own_server.kill()
        thread = threading.Thread(target=worker.run, args=(ScriptedEngine(),))
        thread.start()
        while worker.outage._failures < 3:
            assert thread.is_alive()
            time.sleep(0.002)
        assert worker.pulse.age_s == 0.0
        worker.stop()
        thread.join(10)


def test_a_full_server_is_waited_for(server_url: str) -> None:
    config = WorkerConfig(model="scripted", redis_url=server_url)
    with Shards(server_url, "default") as shards:
        worker = Worker(config, "w", shards)
        full = iter([OutOfMemoryError("full"), ResponseError("MISCONF no disk")])
        real = worker.queue.register

        def register(info: WorkerInfo) -> None:
            for error in full:
                raise error
            worker.stop()
            real(info)

        worker.queue.register = register  # type: ignore[method-assign]
        worker.run(ScriptedEngine())
        assert next(full, None) is None


def test_a_server_lost_while_the_model_was_loaded_is_waited_for(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tokenmill.worker")
    config = WorkerConfig(model="scripted", redis_url=own_server.url)
    with Shards(own_server.url, "default") as shards:
        worker = Worker(config, "w", shards)
        own_server.kill()
        thread = threading.Thread(target=worker.run, args=(ScriptedEngine(),))
        thread.start()
        while "server_lost" not in events(caplog):
            assert thread.is_alive()
            time.sleep(0.002)
        own_server.start()
        with Client(own_server.url) as client:
            assert client.result(client.submit("abc", max_tokens=3), timeout_s=10).ok
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_a_server_that_refuses_workers_is_an_error_with_its_words(
    server_url: str, server: redis.Redis
) -> None:
    config = WorkerConfig(model="scripted", redis_url=server_url)
    server.set(KEYS.worker("w"), "of another type")
    with Shards(server_url, "default") as shards:
        worker = Worker(config, "w", shards)
        with pytest.raises(WrongServer, match=r"refuses a worker: .*wrong kind of value"):
            worker.run(ScriptedEngine())
