"""`KVCache`: the tensors behind the block numbers, and how many blocks there can be."""

import logging
from dataclasses import dataclass

import torch

from tokenmill.engine.config import KV_CACHE_DTYPES
from tokenmill.engine.errors import OutOfMemory
from tokenmill.engine.models.quantization import FP8_CAPABILITY, fp8_capability
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.producer.errors import InvalidRequest

LOGGER = logging.getLogger(__name__)

#: Share of the device memory left by the weights that the KV cache takes on a GPU.
GPU_KV_SHARE = 0.85
CPU_KV_BYTES = 2 << 30

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
_LEAVE_OUT = "leave out --kv-cache-dtype"


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of all layers, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def default_kv_memory(device: torch.device) -> int:
    """Bytes that the KV cache of a rank may take, its weights being there already."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free * GPU_KV_SHARE)
    return CPU_KV_BYTES


def choose_kv_cache_dtype(
    name: str, device: torch.device, dtype: torch.dtype, quantization: str = "none"
) -> torch.dtype:
    """What the cache of a model in `dtype` holds.

    `auto` is the model's dtype, and bfloat16 beside linears in int8, whose loss is larger.

    Raises:
        InvalidRequest: not of `KV_CACHE_DTYPES`, or nothing that this model can use here.
    """
    if name == "auto":
        return torch.bfloat16 if quantization == "int8" else dtype
    if name not in _DTYPES:
        raise InvalidRequest("kv_cache_dtype", f"one of {', '.join(KV_CACHE_DTYPES)}", name)
    chosen = _DTYPES[name]
    if chosen == torch.float8_e4m3fn:
        capability = fp8_capability(device)
        if capability < FP8_CAPABILITY:
            what = "{}.{}".format(*capability) if device.type == "cuda" else "none"
            raise InvalidRequest(
                "kv_cache_dtype",
                "fp8 on a GPU of compute capability 8.9 or more",
                f"fp8 on {device.type} (compute capability {what})",
                _LEAVE_OUT,
            )
    elif chosen != dtype and (chosen, dtype) != (torch.bfloat16, torch.float32):
        model = str(dtype).removeprefix("torch.")
        expected = f"auto for a model in {model}, whose cache is {model} as it is"
        raise InvalidRequest("kv_cache_dtype", expected, name, _LEAVE_OUT)
    return chosen


def num_blocks_in(memory: int, spec: ModelSpec, *, block_size: int, dtype: torch.dtype) -> int:
    """Blocks that `memory` bytes hold.

    Raises:
        OutOfMemory: not even one sequence of the shortest useful length (two blocks) fits.
    """
    block_bytes = spec.kv_token_elements * dtype.itemsize * block_size
    if memory < 2 * block_bytes:
        raise OutOfMemory(
            f"kv_cache_memory must be at least {2 * block_bytes} bytes (two blocks), got {memory}; "
            "raise --kv-cache-memory or choose a smaller model"
        )
    return memory // block_bytes


def allocate_kv_cache(
    spec: ModelSpec,
    num_blocks: int,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """Reserve the cache; on a CPU its pages are paid for only as blocks are used.

    Raises:
        OutOfMemory: the device has no room for it.
    """
    shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)

    def layers() -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]

    held = str(dtype).removeprefix("torch.")
    LOGGER.info("keys and values are held as %s: %d blocks of %d tokens", held, *shape[:2])
    try:
        return KVCache(layers(), layers())
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, the plain class on a CPU
        raise OutOfMemory(
            f"a KV cache of {num_blocks} blocks does not fit {device}: {error}; "
            "lower --kv-cache-memory"
        ) from error
