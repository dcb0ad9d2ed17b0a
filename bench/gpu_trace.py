"""What a profiler's trace says of the device: how much of the time it was busy, and with what.

    |  warm-up  |########|  |######|      |########|      busy = the union of kernels and copies
                ^ a tenth after the first                 ^ the end of the last

The trace is the file that torch's profiler exports. The first tenth is left out of the busy share:
the profiler's start drains the device.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
#: Where there is no device.
HOST_KINDS = ("cpu_op",)
WARM_UP = 0.1
#: Kernels and gaps that are listed, and letters of their names.
LISTED, NAME_CHARS = 16, 90


@dataclass(frozen=True, slots=True)
class Span:
    """Something that ran on the device, in microseconds."""

    name: str
    start: float
    end: float


def profiled(run: Callable[[], int], path: Path) -> dict[str, Any]:
    """Figures of the steps that `run` runs and counts; the trace is left at `path` (.json.gz)."""
    has_gpu = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if has_gpu else torch.profiler.ProfilerActivity.CPU
    if has_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=[kind]) as profile:
        steps = run()
        if has_gpu:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    return figures_of(spans_of(path, DEVICE_KINDS if has_gpu else HOST_KINDS), steps)


def spans_of(path: Path, kinds: Sequence[str]) -> list[Span]:
    """In order of their start."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [
        Span(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]
    return sorted(found, key=lambda span: span.start)


def figures_of(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    """Busy share, launches, and the largest kernels and gaps, each per step."""
    if not spans:
        return {"steps": steps, "busy": None}
    begin, end = spans[0].start, max(span.end for span in spans)
    busy, idle = _divided(spans, begin + WARM_UP * (end - begin))
    took: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        took[span.name[:NAME_CHARS]].append(span.end - span.start)
    gaps: dict[str, list[float]] = defaultdict(list)
    last = spans[0]
    for span in spans:
        if span.start > last.end:
            pair = f"{last.name[: NAME_CHARS // 2]} -> {span.name[: NAME_CHARS // 2]}"
            gaps[pair].append(span.start - last.end)
        last = max(last, span, key=lambda one: one.end)
    return {
        "steps": steps,
        "busy": busy / (busy + idle) if busy + idle else None,
        "ms_per_step": 1e-3 * (end - begin) / steps,
        "launches_per_step": len(spans) / steps,
        "kernels": _largest(took, steps),
        "gaps": _largest(gaps, steps),
    }


def _divided(spans: Sequence[Span], begin: float) -> tuple[float, float]:
    """Of the time from `begin` on, what is covered and what is not."""
    busy = idle = 0.0
    covered = begin
    for span in spans:
        if span.end <= covered:
            continue
        idle += max(span.start - covered, 0.0)
        busy += span.end - max(span.start, covered)
        covered = span.end
    return busy, idle


def _largest(found: dict[str, list[float]], steps: int) -> list[dict[str, object]]:
    ranked = sorted(found.items(), key=lambda item: -sum(item[1]))[:LISTED]
    return [
        {"name": name, "us_per_step": sum(took) / steps, "per_step": len(took) / steps}
        for name, took in ranked
    ]
