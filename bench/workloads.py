"""The workloads that benches share: seeded lengths, random token ids, ends ignored."""

import datetime as dt
import json
import os
import platform
import random
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """Lengths are normal with standard deviation 0.3 x mean, as in the paper's scripts."""

    name: str
    requests: int
    mean_prompt: int
    mean_output: int
    max_prompt: int = 1_000_000
    seed: int = 0

    def prompts(self, vocabulary: int) -> list[tuple[list[int], int]]:
        """(token ids, tokens to generate) of every request."""
        draw = random.Random(self.seed)

        def length(mean: int, most: int) -> int:
            return min(max(round(draw.gauss(mean, 0.3 * mean)), 1), most)

        return [
            (
                [
                    draw.randrange(vocabulary)
                    for _ in range(length(self.mean_prompt, self.max_prompt))
                ],
                length(self.mean_output, 1_000_000),
            )
            for _ in range(self.requests)
        ]


WORKLOADS = {
    "W1": Workload("W1", 48, 260, 60),
    "W2": Workload("W2", 24, 1300, 30, max_prompt=1900),
    "W3": Workload("W3", 48, 40, 200),
}


def in_turn(items: Sequence[T], turn: int) -> list[T]:
    """All items, another one first each turn: a machine that slows down slows all of them down."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def provenance() -> dict[str, object]:
    """Hardware, versions and commit: what a figure is worth nothing without."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    now = dt.datetime.now(dt.UTC)
    return {
        "date": now.date().isoformat(),
        "time": now.time().isoformat("minutes"),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "redis", "tokenmill")},
        "commit": commit(),
    }


@cache
def commit() -> str:
    """The commit when this was first asked; "-dirty" where code differs from it.

    A copy of the tree without its history has none: there TOKENMILL_COMMIT says it, or else "".
    """
    if said := os.environ.get("TOKENMILL_COMMIT"):
        return said
    written = [f":!{path}" for path in ("bench/results", "docs", "engine/planning/devices")]
    return _git("describe", "--always") + (
        "-dirty" if _git("status", "--porcelain", "--", ".", *written) else ""
    )


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git here
        return ""
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_result(name: str, workload: Workload | None, figures: dict[str, object]) -> Path:
    """Write one bench's JSON and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    shape = {"workload": asdict(workload)} if workload else {}
    content = {"bench": name, **shape, **figures, "provenance": provenance()}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
