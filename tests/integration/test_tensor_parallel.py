"""A worker that is a group of processes: one of them dies, or is told to stop."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from children import children_of
from tiny_llama import write_tiny_llama
from tokenmill.engine.pipeline import Pipeline
from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys

pytestmark = [pytest.mark.placed(""), pytest.mark.timeout(120)]
KEYS = Keys()
PROMPT, TOKENS = "w3 w4 w5", 400

StartGroup = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def start_group(model: str, server_url: str) -> Iterator[StartGroup]:
    """`start_group(size)`: a worker of so many ranks."""
    started: list[subprocess.Popen[str]] = []

    def start(size: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "tokenmill.producer.cli", "worker", "--json"]
        command += ["--model", model, "--redis", server_url, "--device", "cpu", "--threads", "1"]
        command += ["--tensor-parallel-size", str(size), "--token-budget", "64"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        sys.stderr.write(process.communicate()[1])


def wait_gone(pids: list[int], within_s: float) -> None:
    ends_at = time.monotonic() + within_s
    for pid in pids:
        while is_running(pid):
            assert time.monotonic() < ends_at, f"{pid} is left"
            os.sched_yield()


def is_running(pid: int) -> bool:
    """Neither gone nor dead and waiting for init to say so."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_rank_is_killed_in_the_middle_and_another_worker_goes_on(
    client: Client, server: redis.Redis, start_group: StartGroup, model: str
) -> None:
    group = start_group(2)
    request = client.submit(PROMPT, max_tokens=TOKENS, ignore_eos=True)
    tokens: list[int] = []
    deltas = client.follow(request)
    while len(tokens) < 30:
        tokens += next(deltas).token_ids
    (rank,) = children_of(group.pid)
    os.kill(rank, signal.SIGKILL)
    killed_at = time.monotonic()
    assert group.wait(10) == 1
    assert time.monotonic() - killed_at < 5.0
    assert group.stderr is not None
    *_, last = group.stderr
    assert last == (
        "Error: a rank of the tensor-parallel group is gone: rank 1 was killed by SIGKILL\n"
    )
    assert server.hget(KEYS.record(request), "state") == b"park"  # given back, not left to a lease
    start_group(1)
    for delta in deltas:
        assert delta.start == len(tokens)
        tokens += delta.token_ids
    with Pipeline(model, device="cpu", token_budget=64) as pipeline:
        (whole,) = pipeline(PROMPT, max_tokens=TOKENS, ignore_eos=True)
    assert tuple(tokens) == whole.token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_group_ends_as_one(
    client: Client, start_group: StartGroup, number: signal.Signals, status: int
) -> None:
    """The signals go to all of its process group, as a terminal and `kill -- -PGID` send them."""
    group = start_group(2)
    deltas = client.follow(client.submit(PROMPT, max_tokens=4000, ignore_eos=True))
    next(deltas)
    ranks = children_of(group.pid)
    assert len(ranks) == 1
    os.killpg(group.pid, number)
    assert group.wait(10) == status
    wait_gone(ranks, 5.0)


@pytest.mark.slow
def test_a_group_of_four_loses_one_and_leaves_none(client: Client, start_group: StartGroup) -> None:
    """Idle, too: nobody has to come for it to be noticed."""
    group = start_group(4)
    assert group.stderr is not None
    for line in group.stderr:
        if "worker_ready" in line:
            break
    ranks = children_of(group.pid)
    os.kill(ranks[1], signal.SIGKILL)
    assert group.wait(10) == 1
    wait_gone(ranks, 5.0)
    assert "rank 2 was killed by SIGKILL" in group.stderr.read()
