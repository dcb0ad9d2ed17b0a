"""The workload of `gpu_engine.py` in transformers' continuous batching, the peer of the same run.

The same requests and shapes, random weights, through the manager behind `generate_batch`, which
takes a length for each request; CUDA graphs are captured before the clock starts.

    python bench/gpu_transformers.py --out OUTDIR [--tiny]
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_device import QWEN3_06B, tiny, write_gpu_result
from gpu_engine import nano_requests
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config


def run(model: AutoModelForCausalLM, requests: list[tuple[list[int], int]]) -> float:
    """Seconds until every answer is there; raises SystemExit where one fails."""
    config = GenerationConfig(
        do_sample=True, temperature=0.6, eos_token_id=-1, pad_token_id=0, max_new_tokens=1024
    )
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        started = time.perf_counter()
        left = {manager.add_request(ids, max_new_tokens=length) for ids, length in requests}
        while left:
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                raise SystemExit(f"continuous batching failed: {result and result.error}")
            if result.is_finished():
                left.discard(result.request_id)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    shapes = tiny(QWEN3_06B) if options.tiny else QWEN3_06B
    is_on_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if is_on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**shapes), dtype=torch.bfloat16 if is_on_gpu else torch.float32
        ).eval()
    requests = nano_requests(*((4, 5, 12) if options.tiny else (256, 100, 1024)), 500)
    run(model, requests[:2])
    seconds = run(model, requests)
    tokens = sum(length for _, length in requests)
    content = {
        "is_tiny": options.tiny,
        "nano": {
            "seconds": seconds,
            "output_tokens": tokens,
            "output_tokens_per_s": tokens / seconds,
        },
        "transformers": version("transformers"),
    }
    write_gpu_result(options.out, "gpu_transformers", content)


if __name__ == "__main__":
    main()
