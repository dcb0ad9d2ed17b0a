"""RQ: `rq_peer.py worker|produce URL`. SimpleWorker (no fork per job), enqueue_many, JSON."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from measure import began_us, measure
from redis import Redis
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer


def noop(number: int) -> list[int]:
    return [number, began_us()]


def produce(url: str) -> None:
    server = Redis.from_url(url)
    queue = Queue(connection=server, serializer=JSONSerializer)

    def submit(numbers: Sequence[int]) -> list[Job]:
        prepare = Queue.prepare_data
        return queue.enqueue_many([prepare("rq_peer.noop", (n,), result_ttl=60) for n in numbers])

    def collect(jobs: list[Job]) -> Iterator[Any]:
        for job in jobs:
            result = job.latest_result(timeout=60)  # blocks in the result's stream
            yield result.return_value

    measure(submit, collect)


def work(url: str) -> None:
    server = Redis.from_url(url)
    worker = SimpleWorker(["default"], connection=server, serializer=JSONSerializer)
    worker.work(logging_level="ERROR")


if __name__ == "__main__":
    {"worker": work, "produce": produce}[sys.argv[1]](sys.argv[2])
