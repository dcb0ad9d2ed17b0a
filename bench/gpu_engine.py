"""Claim to be tested on a GPU: tokens/s of the reference workload, and where a step takes its time.

256 requests, prompt and output lengths uniform in 100-1024 (seed 0), temperature 0.6, ends ignored,
random weights of Qwen3-0.6B's shapes (no weights need to be fetched). Then one decode step and one
mixed step under torch's profiler. All of it in turns, one step ahead, and with CUDA graphs too
(`gpu_modes.py`). `--tiny` runs the same code with tiny shapes on any device.

    python bench/gpu_engine.py --out OUTDIR [--tiny]
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from gpu_device import QWEN3_06B, tiny, write_gpu_result
from gpu_modes import each_mode
from tokenizers import Tokenizer as Backend
from tokenizers import models

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, choose_device, choose_dtype
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.weights import empty_weights, pack, random_weights
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.producer.params import SamplingParams


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


def nano_requests(
    requests: int, low: int, high: int, vocabulary: int
) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate) of each; lengths are uniform in [low, high]."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(vocabulary) for _ in range(draw.randint(low, high))]
        for _ in range(requests)
    ]
    return [(prompt, draw.randint(low, high)) for prompt in prompts]


def run_workload(engine: Engine, requests: list[tuple[list[int], int]]) -> dict[str, float]:
    """Drain the workload; rates over wall time."""
    started, steps = time.perf_counter(), 0
    for number, (prompt, output) in enumerate(requests):
        params = SamplingParams(max_tokens=output, temperature=0.6, ignore_eos=True)
        engine.add(str(number), prompt, params, seed=number)
    while engine.has_work:
        engine.step()
        steps += 1
    seconds = time.perf_counter() - started
    generated = sum(output for _, output in requests)
    return {
        "seconds": seconds,
        "steps": steps,
        "output_tokens": generated,
        "output_tokens_per_s": generated / seconds,
        "total_tokens_per_s": (generated + sum(len(p) for p, _ in requests)) / seconds,
    }


def profile_steps(engine: Engine, prompt: int, sequences: int) -> dict[str, object]:
    """Of a mixed step and of some decode steps: the ten largest by device (or CPU) time."""
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    for number in range(sequences):
        engine.add(f"p{number}", [1] * prompt, params, seed=number)
    tables: dict[str, object] = {"mixed": _profiled(engine, 1)}
    while any(seq.is_prefilling for seq in [*engine.scheduler.running, *engine.scheduler.waiting]):
        engine.step()
    tables["decode"] = _profiled(engine, 8)
    for number in range(sequences):
        engine.abort(f"p{number}")
    return tables


def _profiled(engine: Engine, steps: int) -> dict[str, object]:
    """Wall time of `steps` steps; on a GPU the share of it that the device was busy."""
    has_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if has_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    key = "self_device_time_total" if has_gpu else "self_cpu_time_total"
    engine.step()
    if has_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        if has_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events = sorted(profile.key_averages(), key=lambda e: -getattr(e, key))
    busy_s = 1e-6 * sum(getattr(event, key) for event in events)
    return {
        "steps": steps,
        "wall_ms": 1e3 * seconds,
        "device_busy": busy_s / seconds if has_gpu else None,
        "top_us": {event.key: getattr(event, key) for event in events[:10]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    model = random_model(tiny(QWEN3_06B) if options.tiny else QWEN3_06B)
    requests, low, high = (8, 10, 40) if options.tiny else (256, 100, 1024)

    def measure(mode: dict[str, Any]) -> dict[str, object]:
        size: dict[str, Any] = {"token_budget": 64, "max_num_seqs": 4} if options.tiny else {}
        config = EngineConfig(max_model_len=256 if options.tiny else 2304, **mode, **size)
        engine = Engine(model, config)
        vocabulary = min(10_000, engine.vocab_size)
        run_workload(engine, nano_requests(2, low, low, vocabulary))  # compiles the kernels
        rates = run_workload(engine, nano_requests(requests, low, high, vocabulary))
        print(json.dumps(mode | rates, indent=2), flush=True)
        return {"nano": rates, "profile": profile_steps(engine, high, 4 if options.tiny else 64)}

    def write(found: dict[str, dict[str, object]]) -> None:
        write_gpu_result(options.out, "gpu_engine", {"is_tiny": options.tiny, "modes": found})

    each_mode(measure, write)


if __name__ == "__main__":
    main()
