"""The real model: killed in the middle of its sentences, it says what it would have said."""

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from server import ChaosServer
from stage import Stage
from tokenmill.producer.client import Client
from tokenmill.producer.request_id import request_id_for
from tokenmill.producer.wire import Request, Result
from zygote import Child, Zygote

LEASE_MS = 400
#: Greedy, sampled with a seed, and sampled with the seed of the id; with penalties, as a whole, and
#: with a stop string.
SAMPLING: dict[str, dict[str, Any]] = {
    "Tell me about the sea.": {},
    "Why do cats purr?": {"repetition_penalty": 1.3},
    "Write a story about a miller.": {"temperature": 1.0, "seed": 7},
    "How is bread made?": {"temperature": 0.8, "seed": 8, "top_p": 0.9, "presence_penalty": 0.5},
    "What is a queue?": {"temperature": 1.2},
    "Name three rivers.": {"temperature": 0.9, "seed": 9, "reply_to": "bulk"},
    "List the days of the week.": {"stop": ["Friday"], "ignore_eos": False},
}


def requests_of(client: Client, most: int) -> list[Request]:
    """Under the same ids in every queue: seeds come from them."""
    return [
        client.new_request(
            [{"role": "user", "content": prompt}],
            request_id=request_id_for(prompt),
            **{"max_tokens": most, "ignore_eos": True, **sampling},
        )
        for prompt, sampling in SAMPLING.items()
    ]


@pytest.fixture(scope="module")
def model_zygote() -> Any:
    with Zygote() as zygote:
        zygote.prepare("smollm2_worker.load_model")
        yield zygote


@pytest.fixture
def run(model_zygote: Zygote, chaos_server: ChaosServer) -> Any:
    stages = []

    def run(kills: int, most: int) -> tuple[list[Result], list[int]]:
        """Results, and how many tokens there were at each kill."""
        stages.append(Stage(model_zygote, chaos_server))
        return run_killed(stages[-1], kills, most)

    yield run
    for stage in stages:
        stage.close()


def run_killed(stage: Stage, kills: int, most: int) -> tuple[list[Result], list[int]]:
    rng = random.Random(kills)
    with Client(stage.server.url, queue=stage.queue) as client:
        ids = client.submit_many(requests_of(client, most))
        child = start(stage)
        points = sorted(rng.sample(range(len(ids), most * (len(ids) - 2)), kills))
        killed_at = []
        for point in points:
            killed_at.append(wait_for_tokens(stage, ids, point, child))
            child.send(signal.SIGKILL)
            child.poll(10.0)
            child = start(stage)
        results = [client.result(request_id, timeout_s=60) for request_id in ids]
        child.send(signal.SIGTERM)
        assert child.poll(10.0) == 0
    return results, killed_at


def start(stage: Stage) -> Child:
    log = stage.home / f"worker-{len(stage.workers)}"
    address = {"url": stage.server.url, "queue": stage.queue, "lease_ms": LEASE_MS}
    stage.workers.append(stage.zygote.fork("smollm2_worker.worker", log, **address))
    return stage.workers[-1]


def wait_for_tokens(stage: Stage, ids: list[str], point: int, child: Child) -> int:
    """Until so many are committed, and the worker is in the middle of something."""
    while True:
        rows: list[Any] = [
            stage.direct.hmget(stage.keys.record(i), "offset", "state", "worker") for i in ids
        ]
        total = sum(int(offset) for offset, _, _ in rows)
        mine = f"-{child.pid}-".encode()
        if total >= point and any(s == b"run" and mine in worker for _, s, worker in rows):
            return total
        assert child.poll() is None
        time.sleep(0.005)


def epochs_of(stage: Stage, request_id: str) -> set[bytes]:
    entries: Any = stage.direct.xrange(stage.keys.output(request_id))
    return {fields[b"e"] for _, fields in entries}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("kills", "most"), [(2, 24), pytest.param(10, 64, marks=pytest.mark.slow)])
def test_a_killed_worker_changes_no_token(
    run: Callable[[int, int], tuple[list[Result], list[int]]], kills: int, most: int
) -> None:
    undisturbed, _ = run(0, most)
    results, killed_at = run(kills, most)
    assert len(killed_at) == kills
    for expected, result in zip(undisturbed, results, strict=True):
        assert result.token_ids == expected.token_ids, f"killed at {killed_at}"
        assert result.text == expected.text
        assert result.finish_reason == expected.finish_reason
    assert sum(len(result.token_ids) for result in results) > 5 * most
