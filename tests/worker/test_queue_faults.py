"""The scripts under faults: what producers and readers were promised holds."""

import random
from collections.abc import Callable, Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mill import Flaky, Mill
from tokenmill.producer.scripts import Script
from tokenmill.worker import queue as worker_queue


@pytest.fixture
def make_mill(server: redis.Redis, server_url: str) -> Iterator[Callable[[int], Mill]]:
    made: list[Flaky] = []

    def make(seed: int) -> Mill:
        flaky = Flaky.from_url(server_url, protocol=2, retry=Retry(NoBackoff(), 0))
        assert isinstance(flaky, Flaky)
        flaky.rng, flaky.faults = random.Random(seed), 0.2
        made.append(flaky)
        return Mill(server, flaky, random.Random(seed + 1))

    yield make
    for flaky in made:
        flaky.close()


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]
)
def test_nothing_is_lost_repeated_or_reordered(make_mill: Callable[[int], Mill], seed: int) -> None:
    mill = make_mill(seed)
    mill.run_to_the_end()
    assert mill.born > 20
    assert mill.resumed > 5


@pytest.mark.placed("")
@pytest.mark.parametrize(
    ("script", "guard", "without"),
    [
        ("_APPEND", " or tonumber(r[2]) ~= epoch or r[6] ~= worker then", " then"),
        ("_FINISH", "not r or r.epoch ~= epoch or r.worker ~= worker", "not r"),
        ("_APPEND", "if offset >= start + count then", "if false then"),
        ("_REAP", "park_record(T, r, now, now, r.attempts)", "parked = parked"),
    ],
    ids=["append-epoch", "finish-epoch", "append-repeat", "reap"],
)
def test_a_missing_guard_is_noticed(
    make_mill: Callable[[int], Mill],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    guard: str,
    without: str,
) -> None:
    broken = Script("tokenmill.worker", getattr(worker_queue, script).name)
    assert broken.source.count(guard) == 1
    broken.source = broken.source.replace(guard, without)
    monkeypatch.setattr(worker_queue, script, broken)

    def try_seeds() -> None:
        for seed in range(5):  # the server's clock has a part in what happens
            mill = make_mill(seed)
            mill.server.flushall()
            mill.run_to_the_end()

    with pytest.raises((AssertionError, redis.exceptions.ResponseError)):
        try_seeds()
