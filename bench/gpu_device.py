"""What the GPU benches share: provenance, shapes of models, ceilings, and how a result is kept."""

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from roofline import Ceilings
from workloads import provenance

QWEN3_06B: dict[str, object] = {
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
LLAMA_31_8B: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
LLAMA_2_7B = LLAMA_31_8B | {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "rope_theta": 1e4,
}
LLAMA_2_13B = LLAMA_2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_2_70B = LLAMA_2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
#: All 32 layers are 93 GB in bfloat16, more than the device has: these are the first 8.
MIXTRAL_8_LAYERS = LLAMA_31_8B | {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_hidden_layers": 8,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 8,  # too small for the compiled attention of a CPU, which takes no padding
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny(config: dict[str, object]) -> dict[str, object]:
    """The same family with shapes that a CPU computes at once."""
    return config | _TINY


def time_ms(run: Callable[[], object]) -> tuple[float, float, float]:
    """Milliseconds: the median, and the second and the eighth tenth.

    On a GPU the device's time, with a cold L2 cache; elsewhere the wall time of one call.
    """
    if torch.cuda.is_available():
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=20, rep=80, quantiles=[0.5, 0.2, 0.8])
        return median, low, high
    started = time.perf_counter()
    run()
    taken = 1e3 * (time.perf_counter() - started)
    return taken, taken, taken


@torch.inference_mode()
def measure_gpu_ceilings() -> Ceilings:
    """The best of copying memory (read and written) and of a large bfloat16 product of matrices."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    size, side = (1 << 30, 8192) if has_gpu else (1 << 16, 64)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    kind = torch.bfloat16 if has_gpu else torch.float32
    square = torch.randn(side, side, device=device, dtype=kind)
    _, copying, _ = time_ms(lambda: target.copy_(source))
    _, multiplying, _ = time_ms(lambda: square @ square)
    return Ceilings(2e3 * side**3 / multiplying, 2e3 * size / copying)


@cache
def gpu_provenance() -> dict[str, object]:
    """`provenance` with the GPU, its driver and CUDA; the GPU is None where there is none."""
    if not torch.cuda.is_available():
        return provenance() | {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return provenance() | {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_processors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_gpu_result(out: Path, bench: str, content: Mapping[str, object]) -> None:
    """Write OUT/`bench`.json: what was measured, and on what; whoever is stopped keeps the last."""
    whole = {"bench": bench, **content, "provenance": gpu_provenance()}
    out.mkdir(parents=True, exist_ok=True)
    part = out / f"{bench}.part"
    part.write_text(json.dumps(whole, indent=2) + "\n")
    part.replace(out / f"{bench}.json")


def gpu_arguments(document: str | None, seconds: float) -> argparse.ArgumentParser:
    """The arguments that every GPU bench takes."""
    parser = argparse.ArgumentParser(description=(document or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal, on any device")
    parser.add_argument("--seconds", type=float, default=seconds, help="begin nothing after that")
    return parser


def check_device(options: argparse.Namespace) -> None:
    """Raises SystemExit where there is no GPU and none is to be done without."""
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, got none; try --tiny")
