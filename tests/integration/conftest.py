"""Worker processes with a scripted engine, and what their streams must look like."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripted_engine import ScriptedTokenizer, scripted_token
from tokenmill.producer.keys import Keys
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import chain_digest, unpack_token_ids

SCRIPT = Path(__file__).parents[1] / "rig" / "scripted_worker.py"
KEYS = Keys()


@dataclass
class WorkerProcess:
    """A worker of its own process, and its id."""

    process: subprocess.Popen[bytes]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_ready(self) -> None:
        """Read its log until it is registered."""
        self.wait_for(b'"worker_ready"')

    def wait_for(self, said: bytes) -> None:
        """Read its log until it says so."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if said in line:
                return
        pytest.fail(f"the worker ended before it said {said!r}")

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def is_owner(self, worker_id: str) -> bool:
        """Whether this process registered under that id: `<host>-<pid>-<random>`."""
        return worker_id.split("-")[-2:-1] == [str(self.process.pid)]


@pytest.fixture
def start_worker(request: pytest.FixtureRequest) -> Iterator[Callable[..., WorkerProcess]]:
    """`start_worker(lease_ms=, step_ms=, url=)`: returns at once; claims begin seconds later."""
    started: list[WorkerProcess] = []

    def start(*, lease_ms: int = 15_000, step_ms: int = 5, url: str = "") -> WorkerProcess:
        url = url or request.getfixturevalue("server_url")
        command = [sys.executable, str(SCRIPT), url, str(lease_ms), str(step_ms)]
        started.append(WorkerProcess(subprocess.Popen(command, stderr=subprocess.PIPE)))
        return started[-1]

    yield start
    for worker in started:
        worker.process.kill()
        sys.stderr.write(worker.process.communicate()[1].decode())


@dataclass
class Stream:
    """What a request's output stream holds in the end."""

    #: Of each token, the epoch that wrote it.
    epochs: list[int]
    tokens: list[int]
    finish_reasons: list[str]


@pytest.fixture
def checked_stream(request: pytest.FixtureRequest) -> Callable[..., Stream]:
    """`checked_stream(id, prompt, shards=)`: compare every token, letter and digest."""
    decode = ScriptedTokenizer().decode

    def check(request_id: str, prompt: str, shards: Shards | None = None) -> Stream:
        server = shards.server_of(request_id) if shards else request.getfixturevalue("server")
        keys = shards.keys_of(request_id) if shards else KEYS
        stream = Stream([], [], [])
        digest = ""
        entries: Any = server.xrange(keys.output(request_id))
        for entry_id, fields in entries:
            tokens = unpack_token_ids(fields[b"t"])
            epoch, start = int(fields[b"e"]), len(stream.tokens)
            wanted = [
                scripted_token(list(prompt.encode()), start + n, epoch) for n in range(len(tokens))
            ]
            assert list(tokens) == wanted, f"{request_id} from token {start}, epoch {epoch}"
            assert fields[b"x"].decode() == decode(tokens)
            digest = chain_digest(digest, tokens)
            assert fields[b"h"].decode() == digest
            stream.tokens += tokens
            stream.epochs += [epoch] * len(tokens)
            assert entry_id.decode().partition("-")[0] == str(len(stream.tokens))
            if b"f" in fields:
                stream.finish_reasons.append(fields[b"f"].decode())
        assert stream.epochs == sorted(stream.epochs)
        return stream

    return check
