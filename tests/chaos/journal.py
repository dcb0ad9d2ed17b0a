"""`Journal`: what a process has done, in a file of JSON lines; a new process goes on from it.

Torn lines, left by a kill, count for nothing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Lines of JSON, each written at once."""

    def __init__(self, path: Path) -> None:
        self.lines = list(read_journal(path))
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size:  # after a torn line: it becomes a line by itself, and is dropped
            self._file.write(b"\n")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """What was written whole."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def news(home: Path) -> Iterator[tuple[int, bool]]:
    """Numbers that producers have sent.

    (-1, False) when there are no more for now, (-1, True) when there will be no more.
    """
    files: dict[Path, Any] = {}
    rest: dict[Path, bytes] = {}
    ended: set[Path] = set()
    while True:
        for path in home.glob("producer-*"):
            files.setdefault(path, path.open("rb"))
        for path, file in files.items():
            *lines, rest[path] = (rest.get(path, b"") + file.read()).split(b"\n")
            for line in lines:
                try:
                    values = json.loads(line)
                except ValueError:
                    continue
                if "sent" in values:
                    yield values["sent"], False
                if "end" in values:
                    ended.add(path)
        is_over = len(files) == len(ended) > 0 and (home / "producers-done").exists()
        yield -1, is_over
