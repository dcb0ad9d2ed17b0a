"""Claim to be tested on a GPU: step times of Llama-3.1-8B's shapes against their rooflines.

Random weights in bfloat16. Decode steps of 1 and 64 sequences at a context of about 1,024 tokens,
against reading the weights and the keys and values once; a mixed step of 2,048 tokens, 64 of them
decoding, against its products of matrices. Ceilings are measured in the same run. A step is timed
as the engine's caller sees it: in turns from the schedule to the tokens on the host, one step ahead
from one step's tokens to the next one's.

    python bench/gpu_steps.py --out OUTDIR [--tiny]
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_device import LLAMA_31_8B, tiny, write_gpu_result
from gpu_engine import random_model
from gpu_kernels import TINY, Scale, ceilings
from gpu_modes import each_mode

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel
from tokenmill.producer.params import SamplingParams


class StepTimes:
    """Times steps of an engine at chosen batches."""

    def __init__(self, model: LoadedModel, budget: int, context: int, mode: dict[str, Any]) -> None:
        config = EngineConfig(
            token_budget=budget,
            max_num_seqs=128,
            max_model_len=16 * context,
            prefix_caching=False,
            **mode,
        )
        self._engine = Engine(model, config)
        self._context = context
        self._draw = random.Random(0)
        self._names: list[str] = []

    def decode(self, batch: int, steps: int) -> list[float]:
        """Seconds of steps in which `batch` sequences decode."""
        self._fill(batch)
        seconds = [self._step() for _ in range(steps + 3)][3:]
        self._clear()
        return seconds

    def mixed(self, batch: int, prompt: int, steps: int) -> list[float]:
        """Seconds of full steps that hold `batch` decoding sequences and a part of a prompt."""
        self._fill(batch)
        self._add(prompt)
        seconds = [self._step() for _ in range(steps + 1)][1:]
        self._clear()
        return seconds

    def _fill(self, batch: int) -> None:
        for _ in range(batch):
            self._add(self._context)
        running, waiting = self._engine.scheduler.running, self._engine.scheduler.waiting
        while any(seq.is_prefilling for seq in [*running, *waiting]):
            self._engine.step()

    def _add(self, prompt: int) -> None:
        name = str(len(self._names))
        self._names.append(name)
        ids = [self._draw.randrange(500) for _ in range(prompt)]
        params = SamplingParams(max_tokens=256, temperature=0.6, ignore_eos=True)
        self._engine.add(name, ids, params, seed=len(self._names))

    def _step(self) -> float:
        started = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - started

    def _clear(self) -> None:
        for name in self._names:
            self._engine.abort(name)


def measure(
    model: LoadedModel, limits: dict[str, float], mode: dict[str, Any], *, is_tiny: bool
) -> dict[str, object]:
    """Milliseconds of each kind of step, and its share of the roofline."""
    spec, size = model.spec, model.dtype.itemsize
    elements = sum(linear.weight.numel() for linear in model.weights.linears())
    head = spec.vocab_size * spec.hidden_size
    context, budget, steps = (32, 128, 3) if is_tiny else (1024, 2048, 20)
    times = StepTimes(model, budget, context, mode)
    figures: dict[str, object] = {}
    for batch in (1, 4 if is_tiny else 64):
        read = (elements + batch * context * spec.kv_token_elements) * size
        figures[f"decode, batch {batch}"] = _figure(
            times.decode(batch, steps), read / limits["bytes_per_s"]
        )
    flops = 2 * (elements - head) * budget + 2 * head * 64
    for _ in range(2):  # the first compiles and captures what the second is made of
        taken = times.mixed(4 if is_tiny else 64, (3 if is_tiny else 5) * budget, 3)
    figures[f"mixed, {budget} tokens"] = _figure(taken, flops / limits["flops_per_s"])
    return figures


def _figure(seconds: list[float], least: float) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        "ms": 1e3 * median,
        "ms_low": 1e3 * min(seconds),
        "ms_high": 1e3 * max(seconds),
        "roofline_ms": 1e3 * least,
        "roofline": least / median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("gpu_steps: expected a CUDA device, got none; try --tiny")
    scale = TINY if options.tiny else Scale(torch.device("cuda"), torch.bfloat16)
    model = random_model(tiny(LLAMA_31_8B) if options.tiny else LLAMA_31_8B)
    limits = ceilings(scale)

    def write(found: dict[str, dict[str, object]]) -> None:
        content = {"is_tiny": options.tiny, "ceilings": limits, "modes": found}
        write_gpu_result(options.out, "gpu_steps", content)

    each_mode(lambda mode: measure(model, limits, mode, is_tiny=options.tiny), write)


if __name__ == "__main__":
    main()
