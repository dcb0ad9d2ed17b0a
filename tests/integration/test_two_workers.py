"""Real processes: producers that submit, workers that share, die, stop and come back."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import Delta

KEYS = Keys()
PRODUCER = Path(__file__).parent / "submitting_producer.py"

StartWorker = Callable[..., Any]
CheckedStream = Callable[[str, str], Any]

pytestmark = [pytest.mark.timeout(90), pytest.mark.placed("")]


def submit_from_processes(url: str, producers: int, each: int) -> dict[str, dict[str, Any]]:
    """Requests by id, submitted by several processes at once."""
    running = [
        subprocess.Popen(
            [sys.executable, str(PRODUCER), url, f"p{number}", str(each)], stdout=subprocess.PIPE
        )
        for number in range(producers)
    ]
    rows = [json.loads(line) for p in running for line in p.communicate(timeout=60)[0].splitlines()]
    assert [p.returncode for p in running] == [0] * producers
    return {row["id"]: row for row in rows}


def submit(client: Client, count: int, max_tokens: int) -> dict[str, dict[str, Any]]:
    prompts = [f"question {number}" for number in range(count)]
    return {
        client.submit(prompt, max_tokens=max_tokens): {"prompt": prompt, "max_tokens": max_tokens}
        for prompt in prompts
    }


def check_all(rows: dict[str, dict[str, Any]], checked_stream: CheckedStream) -> dict[str, Any]:
    """Every request ended once, with the right tokens, each once and in order."""
    streams = {}
    for request_id, row in rows.items():
        streams[request_id] = stream = checked_stream(request_id, row["prompt"])
        assert stream.finish_reasons == ["length"], request_id
        assert len(stream.tokens) == row["max_tokens"]
    return streams


def running_at(server: redis.Redis, worker: Any, ids: Iterable[str]) -> list[str]:
    """Requests of `ids` that the worker runs and has written tokens of."""
    found = []
    for request_id in ids:
        row: Any = server.hmget(KEYS.record(request_id), "state", "worker", "offset")
        state, owner, offset = row
        if state == b"run" and int(offset or 0) > 0 and worker.is_owner(owner.decode()):
            found.append(request_id)
    return found


def read_until(
    client: Client, ids: Iterable[str], condition: Callable[[], bool], deltas: list[Delta]
) -> Any:
    """Follow until the condition holds, gathering deltas; returns the follower to read on with."""
    follower = client.follower()
    for request_id in ids:
        follower.add(request_id)
    while not condition():
        assert len(follower), "all ended before the condition held"
        deltas += follower.poll(0.05)
    return follower


def read_rest(follower: Any, deltas: list[Delta]) -> None:
    while len(follower):
        deltas += follower.poll(5.0)


def check_deltas(rows: dict[str, dict[str, Any]], deltas: list[Delta]) -> None:
    """A reader got each token once, in order, and one end."""
    position = dict.fromkeys(rows, 0)
    ended: list[str] = []
    for delta in deltas:
        assert delta.start == position[delta.request_id]
        assert delta.request_id not in ended
        position[delta.request_id] = delta.end
        if delta.finish_reason:
            ended.append(delta.request_id)
    assert sorted(ended) == sorted(rows)


def test_two_workers_share_what_four_producers_submit(
    server: redis.Redis,
    server_url: str,
    client: Client,
    start_worker: StartWorker,
    checked_stream: CheckedStream,
) -> None:
    workers = [start_worker(), start_worker()]
    for worker in workers:
        worker.wait_ready()
    rows = submit_from_processes(server_url, 4, 50)
    assert len(rows) == 200
    deltas = list(client.follow_many(rows))
    check_deltas(rows, deltas)
    streams = check_all(rows, checked_stream)
    assert {epoch for stream in streams.values() for epoch in stream.epochs} == {1}
    owners = [server.hget(KEYS.record(request_id), "worker") for request_id in rows]
    shares = [sum(w.is_owner(owner.decode()) for owner in owners) for w in workers]  # type: ignore[union-attr]
    assert sum(shares) == 200
    assert min(shares) > 20  # neither is left out
    assert server.zcard(KEYS.live) == 0


def test_a_killed_worker_is_replaced_in_the_middle_of_its_sentences(
    server: redis.Redis,
    client: Client,
    start_worker: StartWorker,
    checked_stream: CheckedStream,
) -> None:
    rows = submit(client, 24, 120)
    victim, other = (start_worker(lease_ms=1000), start_worker(lease_ms=1000))
    held: list[str] = []
    deltas: list[Delta] = []

    def is_amid() -> bool:
        held[:] = running_at(server, victim, rows)
        return len(held) >= 3 and bool(running_at(server, other, rows))

    follower = read_until(client, rows, is_amid, deltas)
    victim.send(signal.SIGKILL)
    victim.wait()
    read_rest(follower, deltas)
    check_deltas(rows, deltas)
    streams = check_all(rows, checked_stream)
    resumed = [request_id for request_id in held if len(set(streams[request_id].epochs)) == 2]
    assert resumed, "nothing was in the middle when the worker was killed"


def test_sigterm_drains_in_seconds_and_another_worker_goes_on(
    server: redis.Redis,
    client: Client,
    start_worker: StartWorker,
    checked_stream: CheckedStream,
) -> None:
    rows = submit(client, 12, 150)
    first = start_worker()
    deltas: list[Delta] = []
    follower = read_until(client, rows, lambda: len(running_at(server, first, rows)) >= 5, deltas)
    asked_at = time.monotonic()
    first.send(signal.SIGTERM)
    assert first.wait() == 0
    assert time.monotonic() - asked_at < 3.0
    assert client.workers() == []
    assert server.zcard(KEYS.park) + len(_ended(server, rows)) == len(rows)
    start_worker()
    read_rest(follower, deltas)
    check_deltas(rows, deltas)
    streams = check_all(rows, checked_stream)
    assert any(len(set(stream.epochs)) == 2 for stream in streams.values())
    attempts = {server.hget(KEYS.record(request_id), "attempts") for request_id in rows}
    assert attempts == {b"1"}  # a drain does not count


def test_a_worker_that_was_stopped_and_comes_back_is_fenced(
    server: redis.Redis,
    client: Client,
    start_worker: StartWorker,
    checked_stream: CheckedStream,
) -> None:
    rows = submit(client, 6, 200)
    sleeper = start_worker(lease_ms=500)
    deltas: list[Delta] = []
    follower = read_until(
        client, rows, lambda: len(running_at(server, sleeper, rows)) == len(rows), deltas
    )
    sleeper.send(signal.SIGSTOP)
    other = start_worker(lease_ms=500)
    while not running_at(server, other, rows):
        deltas += follower.poll(0.05)
    sleeper.send(signal.SIGCONT)  # it goes on writing under its old epochs
    read_rest(follower, deltas)
    check_deltas(rows, deltas)
    streams = check_all(rows, checked_stream)
    assert all(len(set(stream.epochs)) >= 2 for stream in streams.values())
    sleeper.send(signal.SIGTERM)
    assert sleeper.wait() == 0


def _ended(server: redis.Redis, rows: Iterable[str]) -> list[str]:
    return [r for r in rows if server.hget(KEYS.record(r), "state") == b"end"]
