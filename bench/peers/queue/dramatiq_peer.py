"""Dramatiq: `dramatiq_peer.py worker|produce URL`. One process of 8 threads, results in Redis."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from measure import began_us, measure

URL = os.environ.get("PEER_URL", "redis://localhost")
broker = RedisBroker(url=URL)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True, result_ttl=60_000)
def noop(number: int) -> list[int]:
    return [number, began_us()]


def produce(_: str) -> None:
    def submit(numbers: Sequence[int]) -> list[Any]:
        return [noop.send(number) for number in numbers]

    def collect(messages: list[Any]) -> Iterator[Any]:
        for message in messages:
            yield message.get_result(block=True, timeout=60_000)

    measure(submit, collect)


def work(_: str) -> None:
    # An idle consumer sleeps up to dramatiq_worker_timeout ms.
    os.environ.setdefault("dramatiq_queue_prefetch", "256")
    command = [sys.executable, "-m", "dramatiq", "dramatiq_peer", "-p", "1"]
    command += ["-t", os.environ.get("PEER_THREADS", "8"), "--skip-logging"]
    os.execv(command[0], command)


if __name__ == "__main__":
    {"worker": work, "produce": produce}[sys.argv[1]](sys.argv[2])
