"""What the forked processes do: `worker`, `producer`, `reader`. Each may be killed at any instant.

Producers and readers keep a journal, a file of JSON lines: what is in it has happened, and a new
process goes on from it. Torn lines, left by a kill, count for nothing.
"""

import functools
import heapq
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mix import Job, job
from mutants import plant
from scripted_engine import ScriptedEngine
from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, OutputChanged, ServerUnreachable
from tokenmill.worker import process
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.queue import Queue

BATCH = 5
#: A request that was caught by this many deaths is no poison here.
MAX_ATTEMPTS = 1000


def worker(
    url: str,
    queue: str,
    lease_ms: int,
    step_ms: float,
    first_step_ms: float = 0.0,
    max_num_seqs: int = 16,
    max_attempts: int = MAX_ATTEMPTS,
    mutant: str = "",
) -> int:
    """A whole worker around the scripted engine."""
    configure(as_json=True, level=logging.DEBUG)
    plant(mutant)
    allow_attempts(max_attempts)
    config = WorkerConfig(model="scripted", redis_url=url, queue=queue, lease_ms=lease_ms)

    def make_engine(_: WorkerConfig) -> ScriptedEngine:
        return ScriptedEngine(
            step_s=step_ms / 1000, first_step_s=first_step_ms / 1000, max_num_seqs=max_num_seqs
        )

    return process.run(config, make_engine=make_engine, waits_for_server=True)


def producer(
    url: str, queue: str, seed: str, directory: str, index: int, of: int, window: int, count: int
) -> int:
    """Submit the jobs whose number is `index` modulo `of`, at most `window` being live at once.

    Journal: `{"sent": number}` once a submit returned, `{"cancel": number, "ok": bool}`. Ends after
    `count` jobs of all, or when there is a file `stop`, with the line `{"end": true}`.
    """
    home = Path(directory)
    journal = Journal(home / f"producer-{index}")
    known = [line["sent"] for line in journal.lines if "sent" in line]
    cancelled = {line["cancel"] for line in journal.lines if "cancel" in line}
    following = max(known, default=index - of) + of
    pending = [(0.0, n) for n in known if _is_cancelled(job(seed, n)) and n not in cancelled]
    client = _client(url, queue)
    while True:
        is_over = following >= count or (home / "stop").exists()
        if is_over and not pending:
            journal.write({"end": True})
            return 0
        try:
            _cancel_due(client, seed, journal, pending)
            if is_over or client.live() >= window:
                time.sleep(0.02)
                continue
            numbers = [n for n in range(following, following + BATCH * of, of) if n < count]
            submit(client, [job(seed, number) for number in numbers])
        except (ServerUnreachable, Busy):
            time.sleep(0.05)
            continue
        for number in numbers:
            journal.write({"sent": number})
            delay = job(seed, number).cancel_after_s
            if delay is not None:
                heapq.heappush(pending, (time.monotonic() + delay, number))
        following = numbers[-1] + of


def reader(url: str, queue: str, seed: str, directory: str, index: int, of: int) -> int:
    """Follow, to the end, what the producers sent and has number `index` modulo `of`.

    Journal: `{"n": number, "start":, "tokens":, "text":, "digest":, "finish":}` for each delta; a
    new reader follows on from the offsets in it.
    """
    home = Path(directory)
    journal = Journal(home / f"reader-{index}")
    offsets: dict[int, int] = {}
    ended: set[int] = set()
    for line in journal.lines:
        if "n" in line:
            offsets[line["n"]] = line["start"] + len(line["tokens"])
            if line["finish"]:
                ended.add(line["n"])
    news = _news(home)
    numbers: dict[str, int] = {}
    follower = _client(url, queue).follower()
    while True:
        is_over = False
        for number, is_over in iter(lambda: next(news), (-1, False)):
            if is_over:
                break
            if number % of == index and number not in ended:
                request_id = job(seed, number).request_id
                numbers[request_id] = number
                follower.add(request_id, offsets.get(number, 0))
        if is_over and not len(follower):
            return 0
        try:
            deltas = follower.poll(0.1)
        except OutputChanged as error:
            journal.write({"changed": numbers[error.request_id]})
            continue
        if not deltas and not len(follower):
            time.sleep(0.02)
        for delta in deltas:
            journal.write(
                {
                    "n": numbers[delta.request_id],
                    "start": delta.start,
                    "tokens": delta.token_ids,
                    "text": delta.text,
                    "digest": delta.digest,
                    "finish": delta.finish_reason,
                }
            )


def allow_attempts(most: int) -> None:
    """Workers of this process give a request up only after so many."""
    vars(process)["Queue"] = functools.partial(Queue, max_attempts=most)


class Journal:
    """Lines of JSON, each written at once."""

    def __init__(self, path: Path) -> None:
        self.lines = list(read_journal(path))
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size:  # after a torn line: it becomes a line by itself, and is dropped
            self._file.write(b"\n")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """What was written whole."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _client(url: str, queue: str) -> Client:
    while True:
        try:
            return Client(url, queue=queue)
        except ServerUnreachable:
            time.sleep(0.05)


def _is_cancelled(item: Job) -> bool:
    return item.cancel_after_s is not None


def submit(client: Client, jobs: list[Job]) -> None:
    """Enqueue them; some twice."""
    requests = []
    for item in jobs:
        client.tenant = item.tenant
        requests.append(
            client.new_request(
                item.prompt,
                request_id=item.request_id,
                priority=item.priority,
                deadline_s=item.deadline_s,
                max_tokens=item.max_tokens,
                seed=item.seed,
            )
        )
    client.submit_many(requests)
    if jobs[0].number % 7 == 0:  # once more: it must be a no-op
        client.submit_many(requests)


def _cancel_due(
    client: Client, seed: str, journal: Journal, pending: list[tuple[float, int]]
) -> None:
    while pending and pending[0][0] <= time.monotonic():
        number = pending[0][1]
        is_cancelled = client.cancel(job(seed, number).request_id)
        journal.write({"cancel": number, "ok": is_cancelled})
        heapq.heappop(pending)


def _news(home: Path) -> Iterator[tuple[int, bool]]:
    """Numbers that producers have sent; (-1, False) when there are no more for now.

    (-1, True) when there will be no more.
    """
    files: dict[Path, Any] = {}
    rest: dict[Path, bytes] = {}
    ended: set[Path] = set()
    while True:
        for path in home.glob("producer-*"):
            files.setdefault(path, path.open("rb"))
        for path, file in files.items():
            *lines, rest[path] = (rest.get(path, b"") + file.read()).split(b"\n")
            for line in lines:
                try:
                    values = json.loads(line)
                except ValueError:
                    continue
                if "sent" in values:
                    yield values["sent"], False
                if "end" in values:
                    ended.add(path)
        is_over = len(files) == len(ended) > 0 and (home / "producers-done").exists()
        yield -1, is_over
