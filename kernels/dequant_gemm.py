"""A linear whose weight stays in 4 or 8 bits and becomes floats tile by tile, in Triton.

    w[n, k] = scales[g, n] * (q[n, k] - zeros[g, n])      g = k // group_size, rounded to x's dtype
    y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]           summed in float32

| tensor | shape        | dtype                   | strides    |
| ------ | ------------ | ----------------------- | ---------- |
| x      | [M, K]       | float32, bfloat16, half | rows, 1    |
| words  | [B, N, W]    | int32                   | contiguous |
| scales | [G, N]       | float32                 | contiguous |
| zeros  | [G, N]       | uint8                   | contiguous |
| bias   | [N]          | that of x               | contiguous |
| y      | [M, N]       | that of x               | contiguous |

The layout of `words` is that of `packed_codes.py`: a block of 128 inputs is 16 words of 4 bits or
32 of 8, and part j of all words of a block are W inputs in a row. A part is thus a plain slice of
x, multiplied as it is: nothing is interleaved, and W inputs have one group if its size is a
multiple of W. The rounded weights are those that a checkpoint read as floats would have.

A row is one sum over K in one order, not divided among programs: its bits do not depend on the
other rows while the tiles keep their height, of which there are three. With `fixed_tiles` the
lowest is left out, so that all are the sum that `fixed_linear.py` speaks of.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import (
    check_contiguous,
    check_device,
    check_dtype,
    check_floating,
    check_rows,
    check_shape,
)
from tokenmill.kernels.packed_codes import BLOCK, words_per_block

#: Rows up to which a tile is used, its height and width, warps, stages; chosen without a GPU:
#: few rows read weights alone, so that narrow tiles keep more processors busy. With three stages
#: the tallest would take 136 KiB of shared memory, which not every GPU has.
_TILES = ((16, 16, 32, 4, 4), (64, 64, 64, 4, 3), (None, 128, 128, 8, 2))


@triton.jit
def _group(scales_ptr, zeros_ptr, group, outputs, inside, N):
    """Scale and zero point [BLOCK_N] of a group; 0 outside, where there is no group."""
    place = group * N + outputs  # below 2^31 while there are fewer than 2^35 weights
    scale = tl.load(scales_ptr + place, mask=inside, other=0.0)
    return scale, tl.load(zeros_ptr + place, mask=inside, other=0).to(tl.int32)


# The rows change from step to step: specialised, each new kind would compile while serving.
@triton.jit(do_not_specialize=["M"])
def _dequant_gemm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    y_ptr,
    x_row,
    M,
    N,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs to a group; 0: all of them are one
    BLOCK: tl.constexpr,  # inputs to a block of words
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = 32 // BITS
    W: tl.constexpr = BLOCK // PARTS
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, inside = rows < M, outputs < N
    lanes = tl.arange(0, W)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_row + lanes[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    words_at = words_ptr + outputs.to(tl.int64)[:, None] * W + lanes[None, :]
    scale, zero = _group(scales_ptr, zeros_ptr, 0, outputs, inside, N)
    for block in range(tl.cdiv(K, BLOCK)):
        words = tl.load(words_at, mask=inside[:, None], other=0)  # [BLOCK_N, W]
        words_at += N * W
        if GROUP > 0 and GROUP % BLOCK == 0:
            group = block * BLOCK // GROUP
            scale, zero = _group(scales_ptr, zeros_ptr, group, outputs, inside, N)
        for part in tl.static_range(PARTS):
            first = block * BLOCK + part * W
            if GROUP > 0 and GROUP % BLOCK != 0:
                held = tl.where(first < K, outputs, N) < N
                scale, zero = _group(scales_ptr, zeros_ptr, first // GROUP, outputs, held, N)
            x = tl.load(
                x_rows + first, mask=row_inside[:, None] & (first + lanes < K)[None, :], other=0.0
            )
            codes = (words >> (part * BITS)) & ((1 << BITS) - 1)
            weight = (codes - zero[:, None]).to(tl.float32) * scale[:, None]
            total = tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + rows.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=row_inside[:, None] & inside[None, :])


def dequant_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    fixed_tiles: bool = False,
) -> torch.Tensor:
    """Return y [M, N] of the formula above; `group_size` 0: all inputs of an output have one scale.

    With `fixed_tiles` a row has the same bits in any batch.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, words, scales, zeros, bias, bits, group_size)
    (num_rows, depth), num_outputs = x.shape, words.shape[1]
    y = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    _, block_m, block_n, warps, stages = next(
        tile for tile in _TILES[1 if fixed_tiles else 0 :] if tile[0] is None or num_rows <= tile[0]
    )
    _dequant_gemm_kernel[(triton.cdiv(num_rows, block_m), triton.cdiv(num_outputs, block_n))](
        x,
        words,
        scales,
        zeros,
        x if bias is None else bias,
        y,
        x.stride(0),
        num_rows,
        num_outputs,
        depth,
        BITS=bits,
        GROUP=group_size,
        BLOCK=BLOCK,
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
    return y


def _check(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    width = words_per_block(bits)
    if group_size < 0 or group_size % width:
        raise ValueError(f"group_size: expected 0 or a multiple of {width}, got {group_size}")
    check_shape("x", x, "M", "K")
    depth = x.shape[1]
    check_shape("words", words, triton.cdiv(depth, BLOCK), "N", width)
    groups = triton.cdiv(depth, group_size) if group_size else 1
    check_shape("scales", scales, groups, words.shape[1])
    check_shape("zeros", zeros, groups, words.shape[1])
    check_floating("x", x)
    check_dtype("words", words, torch.int32)
    check_dtype("scales", scales, torch.float32)
    check_dtype("zeros", zeros, torch.uint8)
    check_rows(x=x)
    check_contiguous(words=words, scales=scales, zeros=zeros)
    check_device(x.device, words=words, scales=scales, zeros=zeros)
    if bias is not None:
        check_shape("bias", bias, words.shape[1])
        check_dtype("bias", bias, x.dtype)
        check_contiguous(bias=bias)
        check_device(x.device, bias=bias)
