"""Processes that a process has started and not waited for (Linux)."""

from contextlib import suppress
from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Their ids, over all threads of `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found
