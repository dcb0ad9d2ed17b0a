"""The steps timed for a model on this machine, kept from one start to the next.

Timing them takes a second or more, of a start that should take three; what they tell is the same
every time. A file is one model as it is computed here: shapes, types, threads, processor, torch,
and our own code. It serves a week, and is only written where the cost model fits what it holds:
steps that were disturbed are timed again at the next start.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from tokenmill.engine.cost_model import CostModel, Timing
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.sources import cache_home

KEEP_S = 7 * 86_400
#: Timing anew is worth nothing below, and trusted above a median relative error of.
LEAST_S, MOST_ERROR = 0.3, 0.15


def kept_or_timed(
    model: LoadedModel, measure: Callable[[], list[Timing]], directory: Path | None = None
) -> list[Timing]:
    """What `measure` gives, or gave at an earlier start of the same model on a CPU."""
    if model.device.type != "cpu":  # there the steps also compile the kernels
        return measure()
    path = (directory or cache_home() / "timings") / f"{_identity(model)}.json"
    found = _read(path)
    if found:
        return found
    started = time.perf_counter()
    timings = measure()
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
