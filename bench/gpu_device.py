"""What the GPU benches share: the device's provenance, and the shapes of the models."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
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


def gpu_provenance() -> dict[str, object]:
    """`provenance` with the GPU, its driver and CUDA; the GPU is None where there is none."""
    if not torch.cuda.is_available():
        return provenance() | {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return provenance() | {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_processors": properties.multi_processor_count,
        "driver": driver.stdout.strip() or None,
        "cuda": torch.version.cuda,
    }


def write_gpu_result(out: Path, bench: str, content: Mapping[str, object]) -> None:
    """Write OUT/`bench`.json: what was measured, and on what."""
    whole = {"bench": bench, **content, "provenance": gpu_provenance()}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{bench}.json").write_text(json.dumps(whole, indent=2) + "\n")
