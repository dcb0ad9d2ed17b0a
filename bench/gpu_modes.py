"""The ways in which an engine can run its steps on a GPU, each measured in the same run."""

import gc
import traceback
from collections.abc import Callable
from typing import Any

import torch

#: The first is what an engine does unasked; the others have not been seen on a device yet.
MODES: dict[str, dict[str, Any]] = {
    "in turns": {},
    "ahead": {"async_scheduling": True},
    "ahead, graphs": {"async_scheduling": True, "cuda_graphs": True},
}


def each_mode(
    measure: Callable[[dict[str, Any]], dict[str, object]],
    write: Callable[[dict[str, dict[str, object]]], None],
) -> None:
    """Measure all, and write what is there after each; one that fails leaves the others alone.

    Raises:
        SystemExit: a way failed; its result is the error.
    """
    found: dict[str, dict[str, object]] = {}
    for name, settings in MODES.items():
        try:
            found[name] = measure(settings)
        except Exception as error:  # noqa: BLE001 - whatever a device may raise
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        write(found)
        gc.collect()  # the next engine needs the memory of this one's cache
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    failed = [name for name, figures in found.items() if "error" in figures]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
