"""What an engine would have compiled for a GPU, which is not there; a program of its own.

Triton compiles a kernel anew for other constants, types, and kinds of integers (1, multiples of
16) and pointers. Here its launches get as far as that, with an engine under random traffic.

    launched.py --traffic FAMILY   after each round of traffic, how much has been compiled: counted
    launched.py --compile FAMILY   compiled for capability 9.0 in real shapes: what ptxas says

with `--deterministic` of such an engine, with `--kv-cache-dtype` of one with such a cache.
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from fake_gpu import drain, fake_engine, fake_gpu, fake_model, in_turns
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.models.packed_linear import IntPacking
from tokenmill.producer.params import SamplingParams

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
#: Shapes of Qwen3-0.6B, Llama-3.1-8B, Mixtral-8x7B and Gemma-2-9B, of two layers each.
REAL: dict[str, tuple[int, ...]] = {
    "qwen3": (151936, 1024, 3072, 16, 8, 128),
    "llama": (128256, 4096, 14336, 32, 8, 128),
    "mixtral": (32000, 4096, 14336, 32, 8, 128),
    "gemma2": (256000, 3584, 14336, 16, 8, 256),
}
OF_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gemma2": {"sliding_window": 64, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 16},
}


class Driver:
    """What a kernel asks of the driver before it is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class Pointer:
    """A tensor of which a kernel asks for its type and whether its address is a multiple of 16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


@dataclass
class Launched:
    """Counts launches and compilations; `compiles` says whether they are made in truth."""

    compiles: bool = False
    num_launches: int = 0
    #: Name and signature of each, in the order in which it was met; and what was compiled.
    variants: list[str] = field(default_factory=list)
    kernels: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        driver.set_active(Driver())
        self._run: Callable[..., Any] = jit.JITFunction.run
        compiled = jit.JITFunction._do_compile

        def compile_once(kernel: Any, key: str, signature: Any, device: int, *rest: Any) -> Any:
            constants, *_ = rest
            self.variants.append(f"{kernel._fn_name} {constants} {key}")
            found = True
            if self.compiles:
                found = compiled(kernel, key, signature, device, *rest)
                self.kernels.append((f"{kernel._fn_name} {signature} {constants}", found))
            kernel.device_caches[device][0][key] = found
            return found

        jit.JITFunction._do_compile = compile_once

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def plain(value: Any) -> Any:
            return Pointer(value) if isinstance(value, torch.Tensor) else value

        self.num_launches += 1
        given = {name: plain(value) for name, value in kwargs.items()}
        self._run(kernel, *map(plain, args), grid=grid, warmup=True, **given)


def traffic(engine: Engine, seed: int, requests: int, longest: int) -> None:
    """Random prompts and outputs, each kind of sampling."""
    draw = random.Random(seed)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.9, "logprobs": 2},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.7, "repetition_penalty": 1.3, "logprobs": 0},
        {"temperature": 0.7, "logit_bias": {5: 2.0, 7: -3.0}},
        {"temperature": 0.7, "min_tokens": 2, "stop_token_ids": (3, 4), "max_tokens": 40},
    ]
    drain(
        engine,
        [
            (
                draw.randint(1, longest),
                SamplingParams(
                    **{"max_tokens": draw.randint(1, longest), "ignore_eos": True}
                    | samplings[number % len(samplings)]
                ),
            )
            for number in range(requests)
        ],
    )


def count(family: str, *, is_packed: bool = False, **modes: Any) -> dict[str, Any]:
    """Launches, and kernels compiled after each of three rounds."""
    launched = Launched()
    with fake_gpu(launched) as mode:
        shapes = TINY | {"model_type": family} | OF_FAMILIES.get(family, {})
        model = fake_model(mode, shapes, IntPacking(4, 32) if is_packed else None)
        size = {"max_model_len": 96, "token_budget": 32, "max_num_seqs": 8, "block_size": 16}
        config: dict[str, Any] = (
            size | {"kv_cache_memory": 1 << 20, "async_scheduling": True} | modes
        )
        engine_config = EngineConfig(**config)
        engine = fake_engine(mode, model, engine_config)
        compiled = []
        waits = nullcontext() if engine_config.async_scheduling else in_turns(mode, 97)
        with waits:
            for seed in range(3):
                traffic(engine, seed, requests=16, longest=40)
                compiled.append(len(launched.variants))
    return {"launches": launched.num_launches, "compiled": compiled}


def compile_all(family: str, **modes: Any) -> list[dict[str, Any]]:
    """What ptxas says of each kernel of a mixed and of decode steps."""
    launched = Launched(compiles=True)
    shapes: dict[str, Any] = dict(zip(NAMES, REAL[family], strict=True))
    shapes |= {"model_type": family, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    with fake_gpu(launched) as mode:
        model = fake_model(mode, shapes | OF_FAMILIES.get(family, {}))
        config = EngineConfig(
            async_scheduling=True,
            cuda_graphs=True,
            max_model_len=4096,
            token_budget=2048,
            max_num_seqs=256,
            kv_cache_memory=8 << 30,
            **modes,
        )
        params = SamplingParams(max_tokens=4, temperature=0.6, ignore_eos=True)
        drain(fake_engine(mode, model, config), [(700 + n, params) for n in range(4)])
    return [described(name, kernel) for name, kernel in launched.kernels]


def described(name: str, kernel: Any) -> dict[str, Any]:
    """Registers a thread, bytes of local and shared memory, warps and stages."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    if found is None:
        raise SystemExit(f"cuobjdump says nothing of {name}: {told}")
    registers, stack, local = map(int, found.groups())
    return {
        "kernel": name,
        "registers": registers,
        "local_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--traffic", choices=REAL)
    what.add_argument("--compile", choices=REAL)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--in-turns", action="store_true")
    parser.add_argument("--packed", action="store_true", help="linears of 4 bits; --traffic alone")
    options = parser.parse_args()
    modes: dict[str, Any] = {
        "deterministic": options.deterministic,
        "kv_cache_dtype": options.kv_cache_dtype,
    }
    found: Any = compile_all(options.compile, **modes) if options.compile else None
    if options.traffic:
        modes["async_scheduling"] = not options.in_turns
        found = count(options.traffic, is_packed=options.packed, **modes)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
