"""arq: `arq_peer.py worker|produce URL`. uvloop, 256 jobs at once, polls every 2 ms (not 500)."""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker
from measure import began_us, measure

POLL_S = 0.002


async def noop(_: Any, number: int) -> list[int]:
    return [number, began_us()]


def produce(url: str) -> None:
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    pool = loop.run_until_complete(create_pool(RedisSettings.from_dsn(url)))
    room = asyncio.Semaphore(64)

    async def one(number: int) -> Any:
        async with room:
            return await pool.enqueue_job("noop", number)

    async def collect(jobs: list[Any]) -> list[Any]:
        return [await job.result(timeout=60, poll_delay=POLL_S) for job in jobs]

    async def submit(numbers: Sequence[int]) -> list[Any]:
        return await asyncio.gather(*map(one, numbers))

    measure(
        lambda numbers: loop.run_until_complete(submit(numbers)),
        lambda jobs: loop.run_until_complete(collect(jobs)),
    )


def work(url: str) -> None:
    asyncio.set_event_loop(uvloop.new_event_loop())
    Worker(
        [noop],
        redis_settings=RedisSettings.from_dsn(url),
        max_jobs=256,
        poll_delay=POLL_S,
        keep_result=60,
    ).run()


if __name__ == "__main__":
    {"worker": work, "produce": produce}[sys.argv[1]](sys.argv[2])
