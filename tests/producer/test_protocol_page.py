"""The commands of docs/protocol.md do what it says, from a shell and from JavaScript."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmill.producer.connection import connect
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import Usage
from tokenmill.worker.queue import Finish, Queue

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "protocol.md").read_text()

#: Where redis-cli is not installed: one command, its reply a line for each item.
CLIENT = """#!{python}
import sys, redis
def lines(reply):
    if isinstance(reply, list):
        for item in reply: yield from lines(item)
    else: yield reply.decode() if isinstance(reply, bytes) else str(reply)
server = redis.Redis(unix_socket_path={socket!r}, protocol=2)
server.response_callbacks.clear()
print("\\n".join(lines(server.execute_command(*sys.argv[1:]))))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def shell(own_server: Any, tmp_path: Path) -> dict[str, str]:
    """An environment whose redis-cli speaks to the server of this test."""
    socket, program = f"{own_server.directory}/s", tmp_path / "redis-cli"
    text = CLIENT.format(python=sys.executable, socket=socket)
    if found := shutil.which("redis-cli"):
        text = f'#!/bin/sh\nexec {found} -s {socket} "$@"\n'
    program.write_text(text)
    program.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "REDIS_SOCKET": socket}


@pytest.fixture
def inbox_worker(own_server: Any) -> Iterator[None]:
    """Answers what comes by the inbox with its prompt."""
    stopped = threading.Event()

    def work() -> None:
        with connect(own_server.url) as server, connect(own_server.url, blocking=True) as blocking:
            queue = Queue(server, Keys(), "w", blocking=blocking)
            while not stopped.is_set():
                queue.wait(0.02)
                queue.admit()
                for claim in queue.claim(sequences=8, tokens=10_000, kv_tokens=100_000):
                    end = Finish(
                        request_id=claim.request_id,
                        epoch=claim.epoch,
                        start=0,
                        text=str(claim.request.prompt),
                        finish_reason="stop",
                        usage=Usage(prompt_tokens=1, completion_tokens=0),
                    )
                    queue.finish([end])

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stopped.set()
    thread.join()


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_shell_commands(shell: dict[str, str], inbox_worker: None) -> None:
    first = "\n".join(blocks("sh")[:2])
    refused, replied, cancelled = blocks("sh")[2:]
    assert "Why is the sky blue?" in run(["sh", "-ec", first], shell)
    said = run(["sh", "-ec", refused], shell)
    assert "temperature must be a number" in said
    assert said.split("end")[1].split()[0] == "error"
    assert "stop" in run(["sh", "-ec", replied], shell)
    assert run(["sh", "-ec", cancelled], shell).split()[-1] == "ENDED"


def test_the_javascript(shell: dict[str, str], inbox_worker: None, tmp_path: Path) -> None:
    """Needs `npm install redis` and NODE_PATH."""
    node = shutil.which("node")
    probe = [node or "node", "-e", 'require("redis")']
    if not node or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("node has no package redis")
    (program,) = blocks("js")
    (tmp_path / "client.js").write_text(program)
    assert run([node, str(tmp_path / "client.js"), "hello"], shell) == "hello"
