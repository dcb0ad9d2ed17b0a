"""Celery: `celery_peer.py worker|produce URL`. One worker process, results in Redis."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from celery import Celery
from measure import began_us, measure

URL = os.environ.get("PEER_URL", "redis://localhost")
app = Celery("celery_peer", broker=URL, backend=URL)
app.conf.update(
    worker_prefetch_multiplier=256,
    result_expires=60,
    task_acks_late=False,
    worker_send_task_events=False,
    task_send_sent_event=False,
    broker_connection_retry_on_startup=True,
)


@app.task(name="noop")  # type: ignore[untyped-decorator]
def noop(number: int) -> list[int]:
    return [number, began_us()]


def produce(_: str) -> None:
    def submit(numbers: Sequence[int]) -> list[Any]:
        return [noop.delay(number) for number in numbers]

    def collect(results: list[Any]) -> Iterator[Any]:
        for result in results:
            yield result.get(timeout=60)

    measure(submit, collect)


def work(_: str) -> None:
    command = [sys.executable, "-m", "celery", "-A", "celery_peer", "worker", "-l", "ERROR"]
    command += ["-P", os.environ.get("PEER_POOL", "solo"), "-c", os.environ.get("PEER_N", "1")]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    os.execv(command[0], command)


if __name__ == "__main__":
    {"worker": work, "produce": produce}[sys.argv[1]](sys.argv[2])
