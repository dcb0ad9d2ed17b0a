"""How a step is filled: interchangeable policies, so that they can be compared in one engine."""

from typing import Protocol

from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step import Step


class Filling(Protocol):
    """What a policy asks of the scheduler."""

    running: list[Sequence]

    def fill_running(self, step: Step, *, prefilling: bool) -> None:
        """Give running sequences their next tokens: the decodes, or the unfinished prompts."""

    def fill_waiting(self, step: Step, *, whole: bool = False) -> None:
        """Admit waiting sequences while the step has room; whole prompts only, or parts too."""

    def admit_all(self) -> None:
        """Admit waiting sequences whatever the step has room for."""


def splitfuse(scheduler: Filling, step: Step) -> None:
    """Decodes, then unfinished prompts, then new ones, in one budget."""
    scheduler.fill_running(step, prefilling=False)
    scheduler.fill_running(step, prefilling=True)
    if not step.preempted:  # who just lost its blocks must not take them back in the same step
        scheduler.fill_waiting(step)


def prefill_first(scheduler: Filling, step: Step) -> None:
    """New prompts, whole; decodes where there are none."""
    scheduler.fill_waiting(step, whole=True)
    if not step.lengths:
        scheduler.fill_running(step, prefilling=True)  # a chunk that the blocks had cut short
        scheduler.fill_running(step, prefilling=False)


def static(scheduler: Filling, step: Step) -> None:
    """A batch's prompts, then its decodes, then the next batch."""
    if not scheduler.running:
        scheduler.admit_all()
    scheduler.fill_running(step, prefilling=True)
    if not step.lengths:
        scheduler.fill_running(step, prefilling=False)
