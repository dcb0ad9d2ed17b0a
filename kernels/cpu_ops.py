"""What a CPU alone has, compiled by numba: packed linears, filters and draws, GGUF's blocks.

Where there is a `can_...`, it says whether the processor and the arguments allow what follows it.
What every device has is in `ops.py`. Modules of numba are imported at the first call, so that a
process on a GPU never loads it.
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch

from tokenmill.kernels import compiler

if TYPE_CHECKING:
    from tokenmill.kernels.compiled_low_rank import Panels


def load_compiled() -> None:
    """Load what the CPU's kernels need, half a second's work that can be done beside other work."""
    if not compiler.is_available():
        return
    others = ["compiled_rows", "compiled_draw", "compiled_filter"]
    if compiler.has_wide_vectors():
        others += ["compiled_linear", "compiled_panels", "program"]
    if compiler.has_byte_products():
        others += ["compiled_int8"]
    names = [f"{__package__}.{name}" for name in others]
    beside = compiler.compile_beside(names)
    importlib.import_module(f"{__package__}.compiled_attention")  # the longest to compile
    if beside is not None:
        compiler.wait_for(beside)
    for name in names:
        importlib.import_module(name)


def has_programs(weight: torch.Tensor) -> bool:
    """Whether compiled kernels of models with such weights can be called as one `Program`."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and compiler.has_wide_vectors()


def can_dequantize(ggml_type: int) -> bool:
    """Whether `dequantize` takes blocks of this type of GGUF."""
    if not compiler.has_wide_vectors():
        return False
    from tokenmill.kernels import compiled_blocks

    return ggml_type in compiled_blocks.BLOCK_BYTES


def dequantize(stored: Any, ggml_type: int, values: torch.Tensor) -> None:
    """Write what `stored`, the bytes of blocks as uint8, stands for to contiguous `values`."""
    from tokenmill.kernels import compiled_blocks

    compiled_blocks.dequantize(stored, ggml_type, values)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `packed_linear` of a weight [N, K] is the fastest here."""
    if not compiler.has_wide_vectors():
        return False
    from tokenmill.kernels import compiled_linear

    return compiled_linear.can_pack(weight)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lay out a weight [N, K] for `packed_linear`, in its own memory if that is contiguous."""
    from tokenmill.kernels import compiled_panels

    return compiled_panels.pack(weight)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [T, K] @ weight.T + bias [N], of a weight that `pack` has laid out."""
    from tokenmill.kernels import compiled_linear

    return compiled_linear.linear(x, packed, bias)


def pack_low_rank(down: torch.Tensor, up: torch.Tensor) -> "Panels":
    """Lay out an adapter's down [r, K] and up [N, r], which `can_pack` takes, in new memory."""
    from tokenmill.kernels import compiled_low_rank

    return compiled_low_rank.pack(down, up)


def add_low_rank(y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, panels: "Panels") -> None:
    """y[rows] [R, N] += what an adapter makes of x[rows] [R, K]; `rows` int64, each once."""
    from tokenmill.kernels import compiled_low_rank

    compiled_low_rank.add_low_rank(y, x, rows, panels)


def can_pack_int8(weight: torch.Tensor) -> bool:
    """Whether `packed_int8_linear` of a weight [N, K] can be had here."""
    if not compiler.has_byte_products():
        return False
    from tokenmill.kernels import compiled_int8

    return compiled_int8.can_pack(weight)


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """Lay out a weight's codes, int8 [N, K], for `packed_int8_linear`, in new memory."""
    from tokenmill.kernels import compiled_int8

    return compiled_int8.pack(codes)


def packed_int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x [T, K] @ weight.T + bias, of codes that `pack_int8` laid out, and scales [N]."""
    from tokenmill.kernels import compiled_int8

    return compiled_int8.linear(x, packed, weight_scales, bias)


def can_filter(logits: torch.Tensor) -> bool:
    """Whether `keep_likely` takes logits [R, V]."""
    if not compiler.is_available():
        return False
    from tokenmill.kernels import compiled_filter

    return compiled_filter.can_filter(logits)


def keep_likely(logits: torch.Tensor, params: list[tuple[float, float, float]]) -> None:
    """Set to -inf what top_k, top_p and min_p of each row leave out of `logits` [R, V]."""
    from tokenmill.kernels import compiled_filter

    compiled_filter.keep_likely(logits, params)


def can_draw(logits: torch.Tensor) -> bool:
    """Whether `draw` takes logits [R, V]."""
    if not compiler.is_available():
        return False
    from tokenmill.kernels import compiled_draw

    return compiled_draw.can_draw(logits)


def draw(logits: torch.Tensor, keys: list[int]) -> list[int]:
    """The token of each row of `logits` [R, V] by Gumbel noise, keyed by 64 bits a row."""
    from tokenmill.kernels import compiled_draw

    return compiled_draw.draw(logits, keys)
