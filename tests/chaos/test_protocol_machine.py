"""The scripts against a model of the protocol, and the model against planted faults."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from machine import CLOCK, QUEUE, Protocol
from mutants import MUTANTS, planted
from tokenmill.producer import exchange
from tokenmill.producer import operator as producer_operator
from tokenmill.producer.client import Client
from tokenmill.producer.scripts import Script
from tokenmill.worker import queue as worker_queue


@pytest.fixture
def _moved_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts take the time from a key."""
    clock = f"redis.call('GET', '{CLOCK}')"
    for module in (exchange, producer_operator, worker_queue):
        for script in [item for item in vars(module).values() if isinstance(item, Script)]:
            time = f"{{ math.floor({clock} / 1000), {clock} % 1000 * 1000 }}"
            patched = script.source.replace("redis.call('TIME')", time)
            monkeypatch.setattr(script, "source", patched)
            monkeypatch.setattr(script, "_sha", "")


@pytest.fixture
def check_model(
    _moved_clock: None, server: redis.Redis, server_url: str
) -> Iterator[Callable[..., None]]:
    """`check_model(examples)`: run the machine; it always takes the same steps."""
    client = Client(server_url, queue=QUEUE)

    class Machine(Protocol):
        pass

    Machine.server, Machine.client = server, client

    def check(examples: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=phases,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )

    yield check
    client.close()


def test_the_scripts_do_what_the_model_says(check_model: Callable[..., None]) -> None:
    check_model(40)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_finds_planted_faults(
    check_model: Callable[..., None], mutant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with planted(mutant), pytest.raises((AssertionError, redis.exceptions.ResponseError)):
        check_model(200, [Phase.generate])
