"""The nano workload in transformers' continuous batching, the peer of the same run.

The same requests and shapes, random weights, through the manager behind `generate_batch`, which
takes a length for each request; it is told of the workload, and what it captures is captured before
the clock starts. It chooses its attention: flash attention where that is installed, torch's SDPA
where not; the result says which. A run that is not over in time counts with the tokens it had.

    python bench/gpu_transformers.py --out OUTDIR [--tiny]
"""

import time
from importlib.metadata import version

import torch
from gpu_device import QWEN3_06B, check_device, gpu_arguments, tiny, write_gpu_result
from gpu_workload import TEMPERATURE, VOCABULARY, Request, nano_requests
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    Qwen3Config,
)
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available


def run(
    model: AutoModelForCausalLM, requests: list[Request], seconds: float
) -> dict[str, float | bool]:
    """Tokens and seconds, until every answer is there or the time is over.

    Raises:
        SystemExit: an answer failed.
    """
    config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        eos_token_id=-1,
        pad_token_id=0,
        max_new_tokens=max(length for _, length in requests),
    )
    hints = WorkloadHints(
        max_prompt_length=max(len(ids) for ids, _ in requests),
        max_generated_length=config.max_new_tokens,
        num_requests=len(requests),
    )
    # It would take nearly all memory of a CPU for its cache.
    few = ContinuousBatchingConfig(block_size=32, num_blocks=64, max_batch_tokens=64)
    with model.continuous_batching_context_manager(
        generation_config=config,
        workload_hints=hints,
        continuous_batching_config=None if torch.cuda.is_available() else few,
    ) as manager:
        started = time.perf_counter()
        left = {manager.add_request(ids, max_new_tokens=length) for ids, length in requests}
        tokens = 0
        while left and time.perf_counter() - started < seconds:
            result = manager.get_result(timeout=1)
            if result is None:
                if manager.is_running():
                    continue
                raise SystemExit("continuous batching ended before its requests")
            if result.error:
                raise SystemExit(f"continuous batching failed: {result.error}")
            if result.is_finished():
                left.discard(result.request_id)
                tokens += len(result.generated_tokens)
        taken = time.perf_counter() - started
        if left:  # what is stopped fails, with the tokens that it has
            manager.stop(block=True, timeout=10, hard_stop=True)
            while (result := manager.get_result(timeout=0.1)) is not None:
                tokens += len(result.generated_tokens)
    return {"seconds": taken, "output_tokens": tokens, "is_whole": not left}


def main() -> None:
    options = gpu_arguments(__doc__, 60).parse_args()
    check_device(options)
    ends = time.perf_counter() + options.seconds
    shapes = tiny(QWEN3_06B) if options.tiny else QWEN3_06B
    has_gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if has_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**shapes), dtype=torch.bfloat16 if has_gpu else torch.float32
        ).eval()
    shape = (4, 6, 20) if options.tiny else (256, 100, 1024)
    requests = nano_requests(*shape, min(VOCABULARY, model.config.vocab_size))
    run(model, [(ids, min(length, 8)) for ids, length in requests[:2]], 30)
    found = run(model, requests, max(ends - time.perf_counter(), 1.0))
    content = {
        "is_tiny": options.tiny,
        "nano": found | {"output_tokens_per_s": found["output_tokens"] / found["seconds"]},
        "has_flash_attention": is_flash_attn_2_available() or is_flash_attn_3_available(),
        "transformers": version("transformers"),
    }
    write_gpu_result(options.out, "gpu_transformers", content)
    print(content)


if __name__ == "__main__":
    main()
