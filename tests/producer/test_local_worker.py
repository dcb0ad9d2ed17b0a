import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill.producer import local_worker
from tokenmill.producer.embedded import stop_if_idle
from tokenmill.producer.generate import generate
from tokenmill.producer.local_worker import LocalWorker, WorkerEnded
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import Report

# Says so when it is there, and waits to be ended.
CHILD = """
import signal
from tokenmill.producer.local_worker import end_with_parent
end_with_parent()
print("there", flush=True)
signal.pause()
"""
PARENT = """
import sys
from tokenmill.producer import local_worker
local_worker._command = lambda *_: [sys.executable, "-c", sys.argv[1]]
worker = local_worker.LocalWorker("m", url="u", queue="q")
while "there" not in worker.log.read_text():
    pass
print(worker._process.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_its_parent_even_when_that_is_killed(state: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate(timeout=30)
    with os.fdopen(child) as ended:  # readable once the process has ended
        assert select.select([ended], [], [], 30)[0]


def test_it_is_started_as_asked(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(
        "subprocess.Popen", lambda command, **_: started.append(command[command.index("--model") :])
    )
    LocalWorker("m", url="u", queue="q")
    LocalWorker(
        "m", url="u", queue="q", quantization="int8", kv_cache_dtype="float32", lora=["a=x", "b=y"]
    )
    plain = ["--model", "m", "--redis", "u", "--queue", "q"]
    more = [
        "--quantization",
        "int8",
        "--kv-cache-dtype",
        "float32",
        "--lora",
        "a=x",
        "--lora",
        "b=y",
    ]
    assert started == [plain, [*plain[:2], *more, *plain[2:]]]


def test_stop_ends_it_and_takes_its_log_away(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_worker, "_command", lambda *_: [sys.executable, "-c", CHILD])
    with LocalWorker("m", url="u", queue="q") as worker:
        worker.check()
        assert worker.log.exists()
    assert not worker.log.exists()
    assert worker._process.poll() is not None


def test_a_worker_that_ends_says_why(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('one'); sys.exit('Error: out of paper')"
    monkeypatch.setattr(local_worker, "_command", lambda *_: [sys.executable, "-c", code])
    worker = LocalWorker("m", url="u", queue="q")
    worker._process.wait(30)
    with pytest.raises(WorkerEnded, match=r"(?s)status 1.*one.*out of paper.*its log is"):
        worker.check()
    worker.stop()
    assert worker.log.exists()


def test_a_run_stops_when_its_worker_cannot_start(state: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    plan = Plan(input=str(source), output=str(tmp_path / "out.jsonl"), model="no-such-model")
    with pytest.raises(WorkerEnded, match=r"(?s)the worker for no-such-model ended.*smollm2"):
        generate(plan, Report())
    assert stop_if_idle()
