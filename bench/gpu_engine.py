"""Claim to be tested on a GPU: tokens/s of the reference workload, and where a step takes its time.

256 requests, prompt and output lengths uniform in 100-1024 (seed 0), temperature 0.6, ends ignored,
random weights of Qwen3-0.6B's shapes, in several modes (`gpu_modes.py`). The first run of a mode
compiles and captures what the workload needs, so it stands apart; the rate is the median of those
after it. The roofline is that of this workload in bfloat16, at ceilings measured in the same run.
Then, in the middle of the same workload, a few mixed steps and 60 decode steps under the profiler,
and as many under Python's own.

    python bench/gpu_engine.py --out OUTDIR [--modes NAME,NAME] [--runs 3] [--tiny]
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_device import QWEN3_06B, check_device, gpu_arguments, measure_gpu_ceilings, tiny
from gpu_modes import MODES, ModeRun, Note, chosen_modes
from gpu_trace import profiled
from gpu_workload import (
    VOCABULARY,
    Request,
    add_all,
    is_prefilling,
    nano_requests,
    other_prompts,
    run_workload,
)
from roofline import Ceilings, need
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, choose_device, choose_dtype
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.weights import empty_weights, pack, random_weights
from tokenmill.engine.tokenizer import Tokenizer

#: A mode is given up after.
MODE_S = 150.0
#: Runs are begun within so long of the end of the first; the second also after a first so short.
RUNS_S, SHORT_S = 15.0, 40.0
#: Steps that are profiled of each kind, and decode steps before them.
MIXED_STEPS, DECODE_STEPS, DECODE_WARM_UP = 6, 60, 40
#: Functions of the host's profile that are listed.
HOST_LISTED = 25


def random_model(config: dict[str, object]) -> LoadedModel:
    """A model of these shapes with seeded random weights, on the best device."""
    spec = spec_from_config(config)
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    weights = empty_weights(spec, dtype, device)
    random_weights(weights, seed=0)
    backend = Backend(models.WordLevel({"w0": 0}, unk_token="w0"))
    return LoadedModel(
        "random", spec, pack(weights), Tokenizer(backend, eos_token_ids=[]), device, dtype
    )


class Nano:
    """The workload on one model, in whatever mode."""

    def __init__(self, options: argparse.Namespace, ceilings: Ceilings) -> None:
        self._out: Path = options.out
        self._runs: int = options.runs
        self._cache: dict[str, Any] = {}
        if options.kv_cache_gib:
            self._cache = {"kv_cache_memory": int(options.kv_cache_gib * 2**30)}
        self._is_tiny: bool = options.tiny
        self._ceilings = ceilings
        self._model = random_model(tiny(QWEN3_06B) if options.tiny else QWEN3_06B)
        shape = (4, 6, 20) if options.tiny else (256, 100, 1024)
        self._vocabulary = min(VOCABULARY, self._model.spec.vocab_size)
        self._requests = nano_requests(*shape, self._vocabulary)

    def measure(self, name: str, note: Note) -> None:
        """All figures of a mode, written as they are found."""
        began = time.perf_counter()
        size: dict[str, Any] = {"max_model_len": 2304}
        if self._is_tiny:
            size = {"max_model_len": 64, "token_budget": 16, "max_num_seqs": 4}
        engine = Engine(self._model, EngineConfig(**size | self._cache | MODES[name]))
        stats = engine.stats()
        note(
            {
                "settings": MODES[name],
                "start_s": time.perf_counter() - began,
                "token_budget": stats.token_budget,
                "kv_blocks": stats.num_blocks,
                "kv_cache_dtype": engine.kv_cache_dtype,
            }
        )
        runs: list[dict[str, float | None]] = []
        ends = 0.0
        while len(runs) < self._runs:
            runs.append(self._timed(engine, len(runs)))
            print(f"{name}: {runs[-1]}", flush=True)
            note({"runs": runs, "nano": _typical(runs)})
            ends = ends or time.perf_counter() + (0.0 if self._is_tiny else RUNS_S)
            is_first = len(runs) == 1 and (runs[0]["seconds"] or 0.0) < SHORT_S
            if time.perf_counter() > ends and not is_first:
                break
        # What an engine keeps to itself, and nobody else asks for.
        graphs = getattr(engine._executor, "_graphs", None)  # noqa: SLF001
        note({"captured": len(getattr(graphs, "_captured", ()))})
        self._profile(engine, name, note)
        note({"cost": self._cost(engine)})
        engine.close()

    def _timed(self, engine: Engine, turn: int) -> dict[str, float | None]:
        requests = other_prompts(self._requests, turn, self._vocabulary)
        rates = run_workload(engine, requests)
        least = need(self._model.spec, [(len(p), n) for p, n in requests], 2, 2)
        return rates | {"roofline": least.seconds(self._ceilings) / (rates["seconds"] or 1.0)}

    def _profile(self, engine: Engine, name: str, note: Note) -> None:
        """Mixed steps once the first requests decode, decode steps once all prompts are done."""
        requests: list[Request] = other_prompts(self._requests, self._runs, self._vocabulary)
        add_all(engine, requests)
        for _ in range(3):
            engine.step()
        file = name.replace(" ", "_")
        trace = self._out / "traces" / f"{file}_mixed.json.gz"
        mixed = profiled(lambda: _steps(engine, MIXED_STEPS, is_prefilling), trace)
        note({"profile": {"mixed": mixed}})
        while is_prefilling(engine):
            engine.step()
        before, count = (1, 3) if self._is_tiny else (DECODE_WARM_UP, DECODE_STEPS)
        _steps(engine, before, lambda e: e.has_work)
        trace = self._out / "traces" / f"{file}_decode.json.gz"
        decode = profiled(lambda: _steps(engine, count, lambda e: e.has_work), trace)
        note({"profile": {"mixed": mixed, "decode": decode}})
        note({"host": host_profile(lambda: _steps(engine, count, lambda e: e.has_work))})
        for number in range(len(requests)):
            engine.abort(str(number))

    def _cost(self, engine: Engine) -> dict[str, float]:
        fit = engine.scheduler.cost.fit
        names = ("fixed_s", "token_s", "kv_token_s", "relative_error", "num_steps")
        return {name: getattr(fit, name) for name in names}


def host_profile(run: Callable[[], int]) -> list[dict[str, object]]:
    """Where Python's time of a step goes, by function; the profiler makes all of it slower."""
    profile = cProfile.Profile()
    steps = profile.runcall(run)
    found: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    ranked = sorted(found.items(), key=lambda item: -item[1][2])[:HOST_LISTED]
    return [
        {
            "function": f"{Path(file).name}:{line} {name}",
            "us_per_step": 1e6 * own / steps,
            "with_inner_us_per_step": 1e6 * whole / steps,
            "per_step": calls / steps,
        }
        for (file, line, name), (_, calls, own, whole, _) in ranked
    ]


def _steps(engine: Engine, most: int, goes_on: Callable[[Engine], bool]) -> int:
    """Run up to `most` steps; how many it were, at least one."""
    for count in range(most):
        if not goes_on(engine):
            return max(count, 1)
        engine.step()
    return most


def _typical(runs: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The run in the middle of those after the first; the first where it is alone."""
    later = sorted(runs[1:] or runs, key=lambda run: run["seconds"] or 0.0)
    middle = later[(len(later) - 1) // 2]
    rates = [run["output_tokens_per_s"] or 0.0 for run in later]
    return middle | {"slowest": min(rates), "fastest": max(rates)}


def main() -> None:
    parser = gpu_arguments(__doc__, 150)
    parser.add_argument("--modes", default="", help=f"of {', '.join(MODES)}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kv-cache-gib", type=float, help="else what the largest step leaves")
    options = parser.parse_args()
    check_device(options)
    names = chosen_modes(options.modes)
    ceilings = measure_gpu_ceilings()
    about = {
        "is_tiny": options.tiny,
        "ceilings": {"flops_per_s": ceilings.flops_per_s, "bytes_per_s": ceilings.bytes_per_s},
    }
    run = ModeRun(options.out, "gpu_engine", about, options.seconds)
    run.run(names, Nano(options, ceilings).measure, MODE_S)


if __name__ == "__main__":
    main()
