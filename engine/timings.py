"""The steps timed for a model on this machine, kept from one start to the next.

Timing them takes a second or more, of a start that should take three; what they tell is the same
every time. A file is one model as it is computed here: shapes, types, threads, processor, torch,
and our own code. It serves a week. Other processes make steps slower, never faster: a start runs
one of the steps again, and times all of them anew where that one is faster than it was; each counts
as it was at its fastest. Steps that the cost model does not fit are not kept.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch

from tokenmill.engine.cost_model import CostModel, Timing
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.sources import cache_home

KEEP_S = 7 * 86_400
#: Timing anew is worth nothing below, and trusted above a median relative error of.
LEAST_S, MOST_ERROR = 0.3, 0.15
#: A step that takes less than this share of the time that is kept tells that it was disturbed.
FASTER = 0.8


class Steps(Protocol):
    """What runs steps to time them."""

    def timings(self) -> list[Timing]:
        """Steps of different sizes and contexts."""

    def time_again(self, timings: Sequence[Timing]) -> tuple[Timing, Timing]:
        """One of those: (as it was, as it is now)."""


def kept_or_timed(model: LoadedModel, steps: Steps, directory: Path | None = None) -> list[Timing]:
    """What `steps` takes, or took at an earlier start of the same model on a CPU."""
    if model.device.type != "cpu":  # there the steps also compile the kernels
        return steps.timings()
    path = (directory or cache_home() / "timings") / f"{_identity(model)}.json"
    found = _read(path)
    if found:
        before, now = steps.time_again(found)
        if now.seconds >= FASTER * before.seconds:
            return found
    started = time.perf_counter()
    timings = _least(steps.timings(), found)
    if time.perf_counter() - started > LEAST_S and _is_regular(timings):
        with suppress(OSError):  # a home that cannot be written: timed at every start
            _write(path, timings)
    return timings


def _identity(model: LoadedModel) -> str:
    packages = [Path(__file__).parent.parent / name for name in ("engine", "kernels")]
    files = sorted(file for package in packages for file in package.glob("**/*.py"))
    code = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    name = next((line for line in lines if line.startswith("model name")), "")
    linears = sorted({type(linear).__name__ for linear in model.weights.linears()})
    parts = (model.spec, model.dtype, model.group.shard, linears, torch.get_num_threads())
    told = repr((*parts, os.cpu_count(), name, torch.__version__, code))
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def _least(timings: list[Timing], others: list[Timing]) -> list[Timing]:
    """`timings`, each as fast as that step ever was."""
    known: dict[tuple[int, int], float] = {}
    for timing in (*timings, *others):
        step = (timing.tokens, timing.kv_tokens)
        known[step] = min(known.get(step, timing.seconds), timing.seconds)
    return [replace(timing, seconds=known[timing.tokens, timing.kv_tokens]) for timing in timings]


def _is_regular(timings: list[Timing]) -> bool:
    cost = CostModel()
    cost.probe(timings)
    return cost.fit.num_steps > 0 and cost.fit.relative_error < MOST_ERROR


def _read(path: Path) -> list[Timing]:
    try:
        if time.time() - path.stat().st_mtime > KEEP_S:
            return []
        found = [Timing(**fields) for fields in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []
    return found if all(timing.seconds > 0 for timing in found) else []


def _write(path: Path, timings: list[Timing]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as part:
        json.dump([asdict(timing) for timing in timings], part)
    Path(part.name).replace(path)
