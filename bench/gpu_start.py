"""From process start to ready on a GPU, and to the first token: what of it takes how long.

Random weights of Qwen3-0.6B's shapes are written as a checkpoint in bfloat16 (with --models also
Llama-3.1-8B's, 16 GB), and started in a process of its own, as a worker does: first with an empty
Triton cache, then with the one that this left. The files are in the page cache both times.

    python bench/gpu_start.py --out OUTDIR [--models qwen3-0.6b,llama-3.1-8b] [--tiny]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TypeGuard

SHAPES = ("qwen3-0.6b", "llama-3.1-8b")


def write_checkpoint(config: dict[str, Any], directory: Path) -> int:
    """A checkpoint of random weights as the hub has them, a file for each layer; its bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    words = {f"w{n}": n for n in range(int(config["vocab_size"]))}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def new(*shape: int) -> "torch.Tensor":
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return (scale * torch.randn(*shape, device=device)).to(torch.bfloat16).cpu()

    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    head_dim = int(config.get("head_dim", hidden // heads))
    outside = {"model.embed_tokens.weight": new(len(words), hidden)}
    outside["model.norm.weight"] = new(hidden)
    if not config["tie_word_embeddings"]:
        outside["lm_head.weight"] = new(len(words), hidden)
    save_file(outside, directory / "model-00000.safetensors")
    for number in range(int(config["num_hidden_layers"])):
        layer = {
            "input_layernorm": new(hidden),
            "post_attention_layernorm": new(hidden),
            "self_attn.q_proj": new(heads * head_dim, hidden),
            "self_attn.k_proj": new(kv_heads * head_dim, hidden),
            "self_attn.v_proj": new(kv_heads * head_dim, hidden),
            "self_attn.o_proj": new(hidden, heads * head_dim),
            "mlp.gate_proj": new(inner, hidden),
            "mlp.up_proj": new(inner, hidden),
            "mlp.down_proj": new(hidden, inner),
        }
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": new(head_dim), "self_attn.k_norm": new(head_dim)}
        named = {f"model.layers.{number}.{name}.weight": part for name, part in layer.items()}
        save_file(named, directory / f"model-{number + 1:05}.safetensors")
    return sum(file.stat().st_size for file in directory.iterdir())


def start(directory: Path, begun: float, *, is_tiny: bool) -> dict[str, Any]:
    """What happens in the process: seconds from `begun`, by `time.time`, and of each part."""
    from gpu_modes import BEST

    from tokenmill.engine.config import EngineConfig
    from tokenmill.engine.start import start_engine
    from tokenmill.producer.params import SamplingParams

    imported = time.time() - begun
    size: dict[str, Any] = {"max_model_len": 64, "token_budget": 16, "max_num_seqs": 4}
    config = EngineConfig(**BEST, **(size if is_tiny else {"max_model_len": 2304}))
    engine = start_engine(str(directory), config)
    ready = time.time() - begun
    engine.add("first", list(range(12)), SamplingParams(max_tokens=8, ignore_eos=True), seed=0)
    while not any(output.token_ids for output in engine.step()):
        pass
    first = time.time() - begun
    while engine.has_work:
        engine.step()
    parts = {"imports": imported, **engine.start_times.seconds}
    found = {"parts_s": parts, "ready_s": ready, "first_token_s": first}
    engine.close()
    return found | {"eighth_token_s": time.time() - begun}


def started(directory: Path, cache: Path, seconds: float, *, is_tiny: bool) -> dict[str, Any]:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--child", str(directory), f"{time.time()}"]
    done = subprocess.run(
        [*command, *(["--tiny"] if is_tiny else [])],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    if done.returncode:
        return {"error": done.stderr[-800:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(arguments: list[str]) -> None:
    found = start(Path(arguments[0]), float(arguments[1]), is_tiny="--tiny" in arguments)
    print(json.dumps(found))


def main() -> None:
    from gpu_device import (
        LLAMA_31_8B,
        QWEN3_06B,
        check_device,
        gpu_arguments,
        tiny,
        write_gpu_result,
    )

    parser = gpu_arguments(__doc__, 45)
    parser.add_argument("--models", default=SHAPES[0], help=f"of {', '.join(SHAPES)}")
    options: argparse.Namespace = parser.parse_args()
    check_device(options)
    ends = time.perf_counter() + options.seconds
    found: dict[str, dict[str, Any]] = {}
    for name in options.models.split(","):
        shapes = dict(zip(SHAPES, (QWEN3_06B, LLAMA_31_8B), strict=True))[name]
        config = tiny(shapes) if options.tiny else shapes
        found[name] = {}
        with tempfile.TemporaryDirectory() as scratch:
            directory, cache = Path(scratch) / "model", Path(scratch) / "triton"
            began = time.perf_counter()
            found[name]["bytes"] = write_checkpoint(config, directory)
            found[name]["writing_s"] = time.perf_counter() - began
            for state in ("empty cache", "warm cache"):
                left = max(ends - time.perf_counter(), 5.0)
                try:
                    one = started(directory, cache, left, is_tiny=options.tiny)
                except subprocess.TimeoutExpired:
                    one = {"error": f"stopped after {left:.0f} s"}
                found[name][state] = one
                print(name, state, one, flush=True)
                content = {"is_tiny": options.tiny, "models": found}
                write_gpu_result(options.out, "gpu_start", content)
    if any(
        "error" in state for one in found.values() for state in one.values() if _is_start(state)
    ):
        raise SystemExit("a start failed")


def _is_start(figure: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(figure, dict)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
