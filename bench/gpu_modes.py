"""The ways in which an engine can run its steps on a GPU, each measured in the same run.

A way that the engine refuses is written down as refused. After one that failed, or took too long,
the program begins again with the rest, as `gpu.sh` has it do after one that ended its process: an
error of the device stays there.
"""

import faulthandler
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_device import write_gpu_result
from gpu_result import read_gpu_result

from tokenmill.producer.errors import InvalidRequest

BEST: dict[str, Any] = {"async_scheduling": True, "cuda_graphs": True}
#: By name, the most telling first; "graphs" is one step ahead in graphs, as are those after it.
MODES: dict[str, dict[str, Any]] = {
    "graphs": BEST,
    "fp8 KV": {**BEST, "kv_cache_dtype": "fp8"},
    "deterministic": {**BEST, "deterministic": True},
    "in turns": {"async_scheduling": False, "cuda_graphs": False},
    "ahead": {"async_scheduling": True, "cuda_graphs": False},
    **{f"budget {size}": {**BEST, "token_budget": size} for size in (1024, 2048, 4096, 8192)},
}
#: What is measured where nothing is said.
USUAL = ("graphs", "fp8 KV", "deterministic", "in turns", "ahead")
#: What says of a mode that no more is to be measured.
ENDS = {"seconds", "refused", "error", "left_out"}
#: Figures of a mode, which `note` adds to and writes.
Note = Callable[[dict[str, object]], None]
Measure = Callable[[str, Note], None]


def chosen_modes(text: str) -> list[str]:
    """The modes that a command line names with commas between; USUAL of none, or "all".

    Raises:
        SystemExit: one of them is unknown.
    """
    if text == "all":
        return list(MODES)
    names = [name.strip() for name in text.split(",") if name.strip()] or list(USUAL)
    if unknown := [name for name in names if name not in MODES]:
        raise SystemExit(f"modes are {', '.join(MODES)}, or all; got {', '.join(unknown)}")
    return names


class ModeRun:
    """Measures modes one after the other into OUT/`bench`.json, under "modes"."""

    def __init__(self, out: Path, bench: str, about: dict[str, object], seconds: float) -> None:
        self._out, self._bench, self._about = out, bench, about
        self._ends = time.perf_counter() + seconds
        # After an error this program was begun again: what it had found before is kept.
        self._found: dict[str, Any] = {}
        if os.environ.get("GPU_BENCH_GOES_ON"):
            self._found = read_gpu_result(out, bench).get("modes", {})
            for figures in self._found.values():
                if not ENDS & figures.keys():
                    figures["error"] = "the process ended"

    @property
    def left_s(self) -> float:
        return self._ends - time.perf_counter()

    def run(self, names: Sequence[str], measure: Measure, mode_seconds: float) -> None:
        """Measure those not measured yet.

        Raises:
            SystemExit: a mode failed; its result has the error.
        """
        for name in names:
            if name in self._found:
                continue
            if self.left_s <= 0:
                self._note(name, {"left_out": "there was no time left"})
                continue
            self._measure(name, measure, mode_seconds)
            gc.collect()  # the next engine needs the memory of this one's cache
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        failed = [name for name, figures in self._found.items() if "error" in figures]
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")

    def _measure(self, name: str, measure: Measure, mode_seconds: float) -> None:
        watch = threading.Timer(mode_seconds, self._stop, [name, mode_seconds])
        watch.daemon = True
        watch.start()
        self._note(name, {})
        started = time.perf_counter()
        try:
            measure(name, lambda figures: self._note(name, figures))
            self._note(name, {"seconds": time.perf_counter() - started})
        except InvalidRequest as error:
            self._note(name, {"refused": str(error)})
        except Exception as error:  # noqa: BLE001 - whatever a device may raise
            traceback.print_exc()
            self._note(name, {"error": f"{type(error).__name__}: {error}"[:500]})
            self._again()
        finally:
            watch.cancel()

    def _stop(self, name: str, mode_seconds: float) -> None:
        faulthandler.dump_traceback()
        self._note(name, {"error": f"stopped after {mode_seconds:.0f} s"})
        self._again()

    def _again(self) -> None:
        """Begin this program again, which measures what is left; nothing on a CPU."""
        if torch.cuda.is_available():
            os.environ["GPU_BENCH_GOES_ON"] = "1"
            arguments = [*sys.argv, "--seconds", f"{max(self.left_s, 0):.0f}"]
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, *arguments])

    def _note(self, name: str, figures: dict[str, object]) -> None:
        self._found[name] = self._found.get(name, {}) | figures
        write_gpu_result(self._out, self._bench, {**self._about, "modes": self._found})
