"""The steps timed for a model on this machine, kept from one start to the next.

Timing them takes a second or more, of a start that should take four; what they tell is the same
every time. A file is one model as it is computed here: shapes, types, quantization, the size of the
cache, threads, processor, torch, and our own code. It serves a week. A file with anything wrong in
it is as good as none. Other processes make steps slower, never faster: a start runs
one of the steps again, and times all of them anew where that one is faster than it was; each counts
as it was at its fastest. Steps that the cost model does not fit are not kept.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch

from tokenmill.engine.cost_model import CostModel, Timing
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.messages import CacheSize
from tokenmill.engine.processor import processor
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

    def time_again(self, timings: Sequence[Timing]) -> tuple[Timing, Timing] | None:
        """One of those: (as it was, as it is now); None: there is none that can be run again."""


def kept_or_timed(
    model: LoadedModel, steps: Steps, size: CacheSize, directory: Path | None = None
) -> list[Timing]:
    """What `steps` takes, or took at an earlier start of the same model on a CPU."""
    if model.device.type != "cpu":  # there the steps also compile the kernels
        return steps.timings()
    try:
        directory = directory or cache_home() / "timings"
    except RuntimeError:  # a user without a home
        return steps.timings()
    path = directory / f"{_identity(model, size)}.json"
    found = _read(path, size)
    again = steps.time_again(found) if found else None
    if again is not None and again[1].seconds >= FASTER * again[0].seconds:
        return found
    started = time.perf_counter()
    timings = _least(steps.timings(), found)
    if time.perf_counter() - started > LEAST_S and _is_regular(timings):
        with suppress(OSError):  # a home that cannot be written: timed at every start
            _write(path, timings)
    return timings


def _identity(model: LoadedModel, size: CacheSize) -> str:
    packages = [Path(__file__).parent.parent / name for name in ("engine", "kernels")]
    files = sorted(file for package in packages for file in package.glob("**/*.py"))
    code = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    linears = sorted(Counter(linear.layout for linear in model.weights.linears()).items())
    parts = (model.spec, model.dtype, model.stored_as, model.group.shard, linears, size)
    told = repr((*parts, processor(), torch.__version__, code))
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


def _read(path: Path, size: CacheSize) -> list[Timing]:
    """What is kept there; nothing where any of it cannot be."""
    try:
        if time.time() - path.stat().st_mtime > KEEP_S:
            return []
        found = [Timing(**fields) for fields in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
    return found if all(_fits(timing, size) for timing in found) else []


def _fits(timing: Timing, size: CacheSize) -> bool:
    """Whether it is what a step takes that the engine can run; its types are those of a file."""
    if [type(value) for value in asdict(timing).values()] != [int, int, float]:
        return False
    longest = size.max_model_len
    is_step = 0 < timing.tokens <= longest and 0 <= timing.kv_tokens <= timing.tokens * longest
    return is_step and 0 < timing.seconds < math.inf


def _write(path: Path, timings: list[Timing]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(number, "w") as part:
            json.dump([asdict(timing) for timing in timings], part)
        Path(name).replace(path)
    finally:  # on a full disk half of it is left
        Path(name).unlink(missing_ok=True)
