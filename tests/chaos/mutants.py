"""Faults planted into the scripts, in the process that calls `plant` and nowhere else."""

from dataclasses import dataclass

from tokenmill.producer.scripts import Script
from tokenmill.worker import queue


@dataclass(frozen=True, slots=True)
class Edit:
    """In a script of the worker, `old` occurs once and becomes `new`."""

    script: str
    old: str
    new: str


def _script(name: str) -> Script:
    found: Script = getattr(queue, f"_{name.upper()}")
    return found


MUTANTS: dict[str, tuple[Edit, ...]] = {}


def plant(mutant: str) -> None:
    """Break the scripts as a mutant says; "" leaves them whole.

    Raises:
        ValueError: the scripts are not what the mutant was written for.
    """
    for edit in MUTANTS[mutant] if mutant else ():
        script = _script(edit.script)
        if script.source.count(edit.old) != 1:
            raise ValueError(f"{mutant}: {edit.script}.lua must contain {edit.old!r} once")
        script.source = script.source.replace(edit.old, edit.new)
