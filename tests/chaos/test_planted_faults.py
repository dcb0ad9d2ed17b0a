"""Each guard of the scripts, taken away, turns the checker red; with all of them it is green."""

from collections.abc import Callable

import pytest

from mutants import MUTANTS
from schedules import SCHEDULES
from stage import Stage

#: Mutant, the schedule that needs the guard, and what the checker finds.
PLANTED = [
    ("append_by_anybody", "zombie_writes", "stale"),
    ("finish_by_anybody", "zombie_ends", "stale"),
    ("append_anywhere", "answers_lost", "refused"),
    ("append_beyond", "rolled_back", "lost"),
    ("finish_anywhere", "rolled_back_at_its_end", "lost"),
    ("ack_at_claim", "orphans", "contradictions"),
    ("disown_at_claim", "orphans", "contradictions"),
    ("drop_at_claim", "orphans", "contradictions"),
    ("end_unwritten", "orphans", "lost"),
    ("reap_keeps_epoch", "orphans", "contradictions"),
    ("nobody_raises_epoch", "zombie_writes", "stale"),
    ("reap_the_living", "calm", "contradictions"),
    ("expire_keeps_epoch", "overdue", "false_ends"),
]

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_scripts_hold(make_stage: Callable[[str], Stage], schedule: str) -> None:
    stage = make_stage("")
    SCHEDULES[schedule](stage)
    report = stage.end()
    assert report.is_right, report
    assert report.requests == len(stage.jobs) > 0


@pytest.mark.parametrize(("mutant", "schedule", "finding"), PLANTED)
def test_a_planted_fault_is_found(
    make_stage: Callable[[str], Stage], mutant: str, schedule: str, finding: str
) -> None:
    stage = make_stage(mutant)
    SCHEDULES[schedule](stage)
    report = stage.end()
    assert getattr(report, finding) > 0, report


def test_every_planted_fault_has_its_schedule() -> None:
    assert {mutant for mutant, _, _ in PLANTED} == set(MUTANTS)
    assert {schedule for _, schedule, _ in PLANTED} == set(SCHEDULES)
