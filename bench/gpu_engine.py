"""Claim to be tested on a GPU: tokens/s of the reference workload, and where a step takes its time.

256 requests, prompt and output lengths uniform in 100-1024 (seed 0), temperature 0.6, ends ignored,
random weights of Qwen3-0.6B's shapes (no weights need to be fetched). Then one decode step and one
mixed step under torch's profiler. `--tiny` runs the same code with tiny shapes on any device.

    python bench/gpu_engine.py --out OUTDIR [--tiny]
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from workloads import provenance

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, choose_device, choose_dtype
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.weights import empty_weights, pack, random_weights
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.producer.params import SamplingParams

QWEN3_06B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TINY = (
    QWEN3_06B
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
    | {
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)


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


def run_workload(engine: Engine, requests: int, low: int, high: int) -> dict[str, float]:
    """Drain the workload; rates over wall time."""
    draw = random.Random(0)
    vocabulary = min(10_000, engine.vocab_size)
    prompts = [
        [draw.randrange(vocabulary) for _ in range(draw.randint(low, high))]
        for _ in range(requests)
    ]
    outputs = [draw.randint(low, high) for _ in range(requests)]
    started, steps = time.perf_counter(), 0
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        params = SamplingParams(max_tokens=output, temperature=0.6, ignore_eos=True)
        engine.add(str(number), prompt, params, seed=number)
    while engine.has_work:
        engine.step()
        steps += 1
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "steps": steps,
        "output_tokens": sum(outputs),
        "output_tokens_per_s": sum(outputs) / seconds,
        "total_tokens_per_s": (sum(outputs) + sum(map(len, prompts))) / seconds,
    }


def profile_steps(engine: Engine, prompt: int, sequences: int) -> dict[str, object]:
    """Tables of one mixed step and one decode step: the ten largest by device (or CPU) time."""
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    for number in range(sequences):
        engine.add(f"p{number}", [1] * prompt, params, seed=number)
    tables: dict[str, object] = {"mixed": _profiled(engine)}
    while any(seq.is_prefilling for seq in [*engine.scheduler.running, *engine.scheduler.waiting]):
        engine.step()
    tables["decode"] = _profiled(engine)
    for number in range(sequences):
        engine.abort(f"p{number}")
    return tables


def _profiled(engine: Engine) -> dict[str, object]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    engine.step()
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    ranked = sorted(profile.key_averages(), key=lambda e: -getattr(e, key))[:10]
    return {
        "wall_ms": 1e3 * (time.perf_counter() - started),
        "top_us": {event.key: getattr(event, key) for event in ranked},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    origin = provenance()
    model = random_model(TINY if options.tiny else QWEN3_06B)
    config = EngineConfig(max_model_len=2304)
    requests, low, high = (8, 10, 40) if options.tiny else (256, 100, 1024)
    engine = Engine(model, config)
    run_workload(engine, 2, low, low)  # compiles the kernels
    figures: dict[str, object] = {"nano": run_workload(engine, requests, low, high)}
    figures["profile"] = profile_steps(engine, high, 4 if options.tiny else 64)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"bench": "gpu_engine", "device": device, **figures, "provenance": origin}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu_engine.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["nano"], indent=2))


if __name__ == "__main__":
    main()
