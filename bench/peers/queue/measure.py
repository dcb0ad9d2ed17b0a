"""What every system of bench/queue_speed.py is put through, its own producer calling this.

A job gets a number and answers (number, CLOCK_MONOTONIC in us when it began, cut to 31 bits).
Standard library alone: it runs in the virtual environment of each peer.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: Pause before each latency probe, so that whoever polls or sleeps is at rest.
IDLE_S = 0.02
#: No more probes are begun after this.
PROBES_S = 12.0
WARM_UP = 64
CLOCK_BITS = (1 << 31) - 1

Answer = Sequence[int]


def began_us() -> int:
    """The clock that all processes of this machine share, cut so that it fits a token id."""
    return time.monotonic_ns() // 1000 & CLOCK_BITS


def measure(
    submit: Callable[[Sequence[int]], Any], collect: Callable[[Any], Iterable[Answer]]
) -> None:
    """Answer the bench's wishes: a line of JSON on stdin each, a line of JSON on stdout each.

    `submit` enqueues numbers and returns handles; `collect` waits for all their answers.
    """
    _checked(WARM_UP, collect(submit(range(WARM_UP))))
    for line in sys.stdin:
        wish = json.loads(line)
        reply = _round if wish["kind"] == "round" else _probe
        print(json.dumps(reply(submit, collect, wish["number"])), flush=True)


def _round(submit: Any, collect: Any, number: int) -> dict[str, float]:
    began = time.monotonic()
    handles = submit(range(number))
    submitted = time.monotonic()
    answers = list(collect(handles))
    ended = time.monotonic()
    _checked(number, answers)
    return {"submit_s": submitted - began, "total_s": ended - began}


def _probe(submit: Any, collect: Any, number: int) -> dict[str, list[float]]:
    started, finished = [], []
    until = time.monotonic() + PROBES_S
    for probe in range(number):
        if time.monotonic() > until:
            break
        time.sleep(IDLE_S)
        sent = began_us()
        (answer,) = collect(submit([probe]))
        finished.append((began_us() - sent & CLOCK_BITS) / 1000)
        started.append((answer[1] - sent & CLOCK_BITS) / 1000)
        if answer[0] != probe:
            raise SystemExit(f"probe {probe} was answered with {answer[0]}")
    return {"started_ms": started, "finished_ms": finished}


def _checked(number: int, answers: Iterable[Answer]) -> None:
    """Every job answered, once."""
    values = sorted(answer[0] for answer in answers)
    if values != list(range(number)):
        raise SystemExit(f"{number} jobs were submitted, {len(values)} answers came: {values[:8]}")
