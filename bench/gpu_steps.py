"""Claim to be tested on a GPU: step times of real shapes against their rooflines.

Random weights in bfloat16. Decode steps of 1 and 64 sequences (fewer where their keys and values do
not fit) at a context of about 1,024 tokens, against reading the weights and the keys and values
once; a mixed step of 2,048 tokens, 64 of them decoding, against its operations. A step is timed as
the engine's caller sees it: in turns from the schedule to the tokens on the host, one step ahead
from one step's tokens to the next one's.

Then, of the first model in graphs, steps of 1 to 2,048 tokens at short and long contexts: what
`tokenmill plan --device OUTDIR/device_MODEL.json` plans with, and `gpu_plan.py` scales.

    python bench/gpu_steps.py --out OUTDIR [--models NAME,NAME] [--modes NAME,NAME] [--tiny]
"""

import argparse
import gc
import json
import random
import statistics
import time
from typing import Any

import torch
from gpu_device import (
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_31_8B,
    MIXTRAL_8_LAYERS,
    check_device,
    gpu_arguments,
    measure_gpu_ceilings,
    tiny,
)
from gpu_engine import random_model
from gpu_modes import MODES, ModeRun, Note, chosen_modes
from gpu_workload import num_tokens
from roofline import Ceilings, Need, step_need

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cost_model import CostModel, Timing
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.planning.device import Device, EngineShape
from tokenmill.engine.planning.step_cost import StepCost
from tokenmill.producer.params import SamplingParams

#: Those that are measured where nothing is said come first.
MODELS = {
    "llama-3.1-8b": LLAMA_31_8B,
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": LLAMA_2_13B,
    "mixtral-8x7b, 8 of 32 layers": MIXTRAL_8_LAYERS,
}
MODE_S = 120.0
#: Queries of a chunk that read its keys and values together.
ROWS_PER_READ = 128
#: The most of the cache that a batch may need.
CACHE_SHARE = 0.9


class StepTimes:
    """Times steps of an engine at chosen batches."""

    def __init__(self, model: LoadedModel, *, mode: dict[str, Any], is_tiny: bool) -> None:
        self.budget, self.context, self.steps = (16, 8, 2) if is_tiny else (2048, 1024, 20)
        self.batches: tuple[int, ...] = (1, 2) if is_tiny else (1, 64)
        #: Steps that are run before others are timed, and how often: the first compile and capture.
        self.first, self.rounds = (1, 1) if is_tiny else (4, 2)
        config = EngineConfig(
            token_budget=self.budget,
            max_num_seqs=self.batches[-1] if is_tiny else 128,
            max_model_len=16 * self.context,
            prefix_caching=False,
            **mode,
        )
        self.engine = Engine(model, config)
        pool = self.engine.scheduler.pool
        self.room = int(CACHE_SHARE * pool.num_blocks * pool.block_size)
        self._draw = random.Random(0)
        self._names: list[str] = []
        self.batches = tuple(min(b, self.most_sequences(self.context)) for b in self.batches)

    def most_sequences(self, context: int) -> int:
        """Sequences at that context that fit the cache, beside a long prompt."""
        return max((self.room - 8 * self.budget) // (context + self.context // 8), 1)

    def decode(self, batch: int, context: int, steps: int) -> tuple[float, list[float]]:
        """The mean context of steps in which `batch` sequences decode, and their seconds."""
        self._fill(batch, context)
        seconds = [self._step() for _ in range(self.first + steps)][self.first :]
        self._clear()
        return context + self.first + steps / 2, seconds

    def mixed(self, batch: int, tokens: int, steps: int) -> tuple[float, list[float]]:
        """Of steps of so many tokens, `batch` of them decoding: the mean start of their chunks,
        and their seconds.
        """
        for _ in range(self.rounds):
            start, seconds = self._mixed(batch, tokens, steps)
        return start, seconds

    def _mixed(self, batch: int, tokens: int, steps: int) -> tuple[float, list[float]]:
        self._fill(batch, self.context)
        scheduler, budget = self.engine.scheduler, self.engine.scheduler.token_budget
        scheduler.token_budget = tokens
        self._add((steps + 3) * (tokens - batch))
        seconds = [self._step() for _ in range(steps + 2)][2:]
        scheduler.token_budget = budget
        self._clear()
        return (2 + (steps - 1) / 2) * (tokens - batch), seconds

    def _fill(self, batch: int, context: int) -> None:
        for _ in range(batch):
            self._add(context)
        running, waiting = self.engine.scheduler.running, self.engine.scheduler.waiting
        while any(seq.is_prefilling for seq in [*running, *waiting]):
            self.engine.step()

    def _add(self, prompt: int) -> None:
        name = str(len(self._names))
        self._names.append(name)
        ids = [self._draw.randrange(500) for _ in range(prompt)]
        params = SamplingParams(max_tokens=256, temperature=0.6, ignore_eos=True)
        self.engine.add(name, ids, params, seed=len(self._names))

    def _step(self) -> float:
        started = time.perf_counter()
        num_tokens(self.engine.step())  # an error would make the next steps smaller
        return time.perf_counter() - started

    def _clear(self) -> None:
        for name in self._names:
            self.engine.abort(name)
        self.engine.step()  # nobody waits for what was on its way


def step_figures(times: StepTimes, model: LoadedModel, ceilings: Ceilings, note: Note) -> None:
    """Milliseconds of each kind of step, and its share of the roofline."""
    found: dict[str, object] = {}
    kv_bytes = getattr(torch, times.engine.kv_cache_dtype).itemsize
    size = model.dtype.itemsize
    for batch in dict.fromkeys(times.batches):
        mean, seconds = times.decode(batch, times.context, times.steps)
        need = step_need(model.spec, [(round(mean), 1)] * batch, size, kv_bytes)
        found[f"decode, batch {batch}"] = _figure(seconds, need, ceilings)
        note({"steps": found})
    batch, tokens = min(times.batches[-1], times.budget // 2), times.budget
    start, seconds = times.mixed(batch, tokens, min(times.steps, 4))
    chunks = [*[(times.context, 1)] * batch, (round(start), tokens - batch)]
    need = step_need(model.spec, chunks, size, kv_bytes)
    found[f"mixed, {tokens} tokens"] = _figure(seconds, need, ceilings)
    note({"steps": found})


def _figure(seconds: list[float], need: Need, ceilings: Ceilings) -> dict[str, float | str]:
    median, least = statistics.median(seconds), need.seconds(ceilings)
    is_reading = need.bytes / ceilings.bytes_per_s > need.flops / ceilings.flops_per_s
    return {
        "ms": 1e3 * median,
        "ms_low": 1e3 * min(seconds),
        "ms_high": 1e3 * max(seconds),
        "roofline_ms": 1e3 * least,
        "roofline": least / median,
        "bound": "memory" if is_reading else "computing",
    }


def cost_device(times: StepTimes, name: str, note: Note, *, is_tiny: bool) -> Device:
    """What steps cost by their tokens and contexts, for planning."""
    half, full = times.context // 4, times.context
    most = times.most_sequences(2 * full)
    decodes = [(1, half), (1, 2 * full), (16, full), (64, half), (64, 2 * full)]
    if is_tiny:
        decodes = [(1, full)]
    timings: list[Timing] = []
    for batch, context in dict.fromkeys((min(b, most), c) for b, c in decodes):
        mean, seconds = times.decode(batch, context, times.steps // 2)
        timings.append(Timing(batch, round(batch * mean), statistics.median(seconds)))
        note({"timings": [(t.tokens, t.kv_tokens, t.seconds) for t in timings]})
    for tokens in (4, 8) if is_tiny else (64, 128, 256, 384, 512, 768, 1024, 1536, 2048):
        batch = min(1 if is_tiny else 4, most)
        start, seconds = times.mixed(batch, tokens, min(times.steps, 3))
        chunk = tokens - batch
        read = batch * full + -(-chunk // ROWS_PER_READ) * (round(start) + chunk)
        timings.append(Timing(tokens, read, statistics.median(seconds)))
        note({"timings": [(t.tokens, t.kv_tokens, t.seconds) for t in timings]})
    return device_of(timings, times.engine, name)


def device_of(timings: list[Timing], engine: Engine, name: str) -> Device:
    """The curve over tokens goes through what was measured, less what reading the cache takes."""
    cost = CostModel()
    cost.probe(timings)
    kv_token_s = cost.fit.kv_token_s
    best: dict[int, float] = {}
    for timing in timings:
        left = max(timing.seconds - kv_token_s * timing.kv_tokens, 1e-6)
        best[timing.tokens] = min(best.get(timing.tokens, left), left)
    points: list[tuple[float, float]] = []
    for tokens, seconds in sorted(best.items()):
        points.append((tokens, max(seconds, points[-1][1] if points else 0.0)))
    scheduler, pool = engine.scheduler, engine.scheduler.pool
    shape = EngineShape(
        token_budget=scheduler.token_budget,
        max_num_seqs=scheduler.max_num_seqs,
        kv_tokens=pool.num_blocks * pool.block_size,
        block_size=pool.block_size,
    )
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU, for rehearsal"
    fit = cost.fit
    return Device(
        cost=StepCost(points=tuple(points), kv_token_s=kv_token_s, rows_per_read=ROWS_PER_READ),
        engine=shape,
        device=f"{name}, bfloat16, on {place}",
        source=f"bench/gpu_steps.py, {len(timings)} kinds of steps; as a line {fit.fixed_s:.2e} + "
        f"{fit.token_s:.2e} tokens + {fit.kv_token_s:.2e} KV tokens, median error "
        f"{fit.relative_error:.1%}",
    )


class Steps:
    """Models and modes, one after the other; a model stays while it is measured."""

    def __init__(self, options: argparse.Namespace, ceilings: Ceilings) -> None:
        self._options = options
        self._ceilings = ceilings
        self._name = ""
        self._model: LoadedModel | None = None

    def measure(self, name: str, note: Note) -> None:
        model_name, mode = name.split(": ")
        model = self._loaded(model_name)
        times = StepTimes(model, mode=MODES[mode], is_tiny=self._options.tiny)
        note({"model": model_name, "mode": mode, "kv_tokens": times.room})
        step_figures(times, model, self._ceilings, note)
        if model_name == next(iter(MODELS)) and mode == "graphs":
            device = cost_device(times, model_name, note, is_tiny=self._options.tiny)
            path = self._options.out / f"device_{model_name}.json"
            path.write_text(json.dumps(device.to_mapping(), indent=2) + "\n")
        times.engine.close()

    def _loaded(self, name: str) -> LoadedModel:
        if self._model is None or self._name != name:
            self._model = None
            gc.collect()
            shapes = tiny(MODELS[name]) if self._options.tiny else MODELS[name]
            self._name, self._model = name, random_model(shapes)
        return self._model


def main() -> None:
    parser = gpu_arguments(__doc__, 70)
    parser.add_argument("--models", default="", help=f"of {'; '.join(MODELS)}; the first, or all")
    parser.add_argument("--modes", default="graphs,in turns", help=f"of {', '.join(MODES)}")
    options = parser.parse_args()
    check_device(options)
    chosen = [name.strip() for name in options.models.split(";") if name.strip()]
    names = list(MODELS) if chosen == ["all"] else chosen or list(MODELS)[:1]
    if unknown := [name for name in names if name not in MODELS]:
        raise SystemExit(f"models are {'; '.join(MODELS)}, or all; got {'; '.join(unknown)}")
    ceilings = measure_gpu_ceilings()
    about = {
        "is_tiny": options.tiny,
        "ceilings": {"flops_per_s": ceilings.flops_per_s, "bytes_per_s": ceilings.bytes_per_s},
    }
    run = ModeRun(options.out, "gpu_steps", about, options.seconds)
    modes = chosen_modes(options.modes)
    both = [f"{name}: {mode}" for name in names for mode in modes]
    run.run(both, Steps(options, ceilings).measure, MODE_S)


if __name__ == "__main__":
    main()
