"""SIGTERM under full load: out in seconds, everything goes on elsewhere, no attempt is counted."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from stage import Stage

SEQUENCES = 128


def running(stage: Stage) -> list[dict[str, str]]:
    return [r for r in stage.records() if r["state"] == "run" and int(r["offset"] or 0) > 0]


@pytest.mark.timeout(90)
def test_a_full_worker_leaves_in_seconds(make_stage: Callable[[str], Stage]) -> None:
    stage = make_stage("")
    stage.submit(SEQUENCES + 32)
    first = stage.start_worker(lease_ms=60_000, step_ms=50, max_num_seqs=SEQUENCES)
    stage.until(lambda: len(running(stage)) >= SEQUENCES)
    first.send(signal.SIGTERM)
    asked_at = time.monotonic()
    assert first.poll(10.0) == 0
    assert time.monotonic() - asked_at < 5.0
    records = stage.records()
    assert {r["state"] for r in records} <= {"wait", "park", "end"}
    parked = [r for r in records if r["state"] == "park"]
    assert {r["attempts"] for r in parked} == {"0"}
    registered: Any = stage.direct.zrange(stage.keys.workers, 0, -1)
    assert registered == []
    stage.start_worker(max_num_seqs=SEQUENCES + 32, step_ms=1)
    report = stage.end()
    assert report.is_right, report
    assert report.resumes == sum(int(r["offset"]) > 0 for r in parked) >= SEQUENCES - 16
    assert {r["attempts"] for r in stage.records()} == {"1"}
