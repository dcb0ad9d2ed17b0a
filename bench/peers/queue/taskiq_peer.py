"""taskiq-redis: `taskiq_peer.py worker|produce URL`. Stream broker, uvloop, one worker process."""

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import uvloop
from measure import began_us, measure
from taskiq.serializers import MSGPackSerializer
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker

URL = os.environ.get("PEER_URL", "redis://localhost")
BROKERS = {"stream": RedisStreamBroker, "list": ListQueueBroker}
backend: Any = RedisAsyncResultBackend(
    URL, result_ex_time=60, serializer=MSGPackSerializer(), keep_results=False
)
broker: Any = BROKERS[os.environ.get("PEER_BROKER", "stream")](URL).with_result_backend(backend)


@broker.task(task_name="noop")  # type: ignore[misc]
async def noop(number: int) -> list[int]:
    return [number, began_us()]


def produce(_: str) -> None:
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(broker.startup())
    room = asyncio.Semaphore(64)

    async def one(number: int) -> Any:
        async with room:
            return await noop.kiq(number)

    async def submit(numbers: Sequence[int]) -> list[Any]:
        return await asyncio.gather(*map(one, numbers))

    async def collect(tasks: list[Any]) -> list[Any]:
        results = [await task.wait_result(check_interval=0.001, timeout=60) for task in tasks]
        return [result.return_value for result in results]

    measure(
        lambda numbers: loop.run_until_complete(submit(numbers)),
        lambda tasks: loop.run_until_complete(collect(tasks)),
    )


def work(_: str) -> None:
    command = [sys.executable, "-m", "taskiq", "worker", "taskiq_peer:broker", "--workers", "1"]
    command += ["--max-async-tasks", "256", "--max-prefetch", "256", "--log-level", "ERROR"]
    command += ["--no-parse", "--ack-type", "when_received"]
    os.execv(command[0], command)


if __name__ == "__main__":
    {"worker": work, "produce": produce}[sys.argv[1]](sys.argv[2])
