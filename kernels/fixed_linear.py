"""A linear whose rows have the same bits in any batch, in Triton.

    y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]           summed in float32, rounded once

| tensor | shape  | dtype                   | strides    |
| ------ | ------ | ----------------------- | ---------- |
| x      | [M, K] | float32, bfloat16, half | rows, 1    |
| w      | [N, K] | that of x               | contiguous |
| bias   | [N]    | that of x               | contiguous |
| y      | [M, N] | that of x               | contiguous |

cuBLAS chooses a kernel, and into how many parts it divides K, by the number of rows. Here a result
is one sum over K, in one program, in one order: from 0 in steps of 16 (the depth of a tensor core's
instruction), each added to the float32 sum so far. The number of rows chooses the tile alone, and
that is no other sum:

- All tiles are at least 64 rows high, so that on Hopper all use wgmma.m64nNk16, never the mma of
  lower tiles. An element of its result depends on a row of one operand, a column of the other and
  the sum so far; height and width of a tile only say how many elements are computed beside it.
  PTX promises no order within the 16, but those who probed the units of V100, A100 and H100 found
  one order for all elements. So it is a property of the device: tests hold it there (`-m gpu`), and
  an engine that is to be deterministic compares bits at its start.
- All tiles take 64 inputs at a time, 4 steps. Those behind K are zeros, which change nothing.

In float32 there is one tile.

A large tile reads less: 1 / BLOCK_M + 1 / BLOCK_N elements for a product. But there must be
programs enough to keep memory and cores busy, so that few rows, or few outputs, have smaller tiles.
Programs beside each other share their rows of x and w in the L2.

Never run on a device.
"""

import functools
from typing import NamedTuple

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

#: Tiles below each other whose programs run beside each other.
_BAND = 8


class Tile(NamedTuple):
    """Rows, outputs and inputs that a program takes at a time, its warps, stages of its loop."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


#: Largest first, and how many programs there must be of it: fewer would leave memory or cores idle
#: that the next smaller one keeps busy. Chosen without a GPU, by the times of the log.
_TILES = (
    (84, Tile(128, 256, 64, 8, 4)),
    (64, Tile(128, 128, 64, 8, 4)),
    (64, Tile(64, 128, 64, 4, 4)),
    (64, Tile(64, 64, 64, 4, 6)),
    (64, Tile(64, 32, 64, 4, 8)),
    (0, Tile(64, 16, 64, 4, 9)),
)
_FLOAT32 = Tile(64, 32, 32, 4, 2)
#: Shared memory that a program may take on devices whose compute capability begins so, and on all
#: others since 8.6; with less than three stages of a tile the next one is better.
_LARGE, _LARGE_MEMORY, _MEMORY = (9, 10), 192 * 1024, 96 * 1024
_LEAST_STAGES = 3


@triton.jit(do_not_specialize=["M"])
def _fixed_linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    x_row,
    M,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    band_size = BAND * tl.cdiv(N, BLOCK_N)
    first_tile = program // band_size * BAND
    height = tl.minimum(row_tiles - first_tile, BAND)
    row_tile = first_tile + program % band_size % height
    output_tile = program % band_size // height
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = output_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, output_inside = rows < M, outputs < N
    inputs = tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_row + inputs[None, :]
    w_at = w_ptr + outputs.to(tl.int64)[:, None] * K + inputs[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x_inside, w_inside = row_inside[:, None], output_inside[:, None]
        if not EVEN_K:
            x_inside &= (k + inputs < K)[None, :]
            w_inside &= (k + inputs < K)[None, :]
        x = tl.load(x_at + k, mask=x_inside, other=0.0)
        w = tl.load(w_at + k, mask=w_inside, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=output_inside, other=0.0)
        total += bias.to(tl.float32)[None, :]
    y_at = y_ptr + rows.to(tl.int64)[:, None] * N + outputs[None, :]
    inside = row_inside[:, None] & output_inside[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=inside)


def fixed_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Return y [M, N] of the formula above; `tile` None: as the shape wants.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, w, bias)
    (num_rows, depth), num_outputs = x.shape, w.shape[0]
    y = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if tile is None:
        tile = choose_tile(num_rows, num_outputs, x.dtype, is_large=is_large(x.device))
    count = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_outputs, tile.outputs)
    _fixed_linear_kernel[(count,)](
        x,
        w,
        x if bias is None else bias,
        y,
        x.stride(0),
        num_rows,
        num_outputs,
        depth,
        HAS_BIAS=bias is not None,
        EVEN_K=depth % tile.inputs == 0,
        BAND=_BAND,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.inputs,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
    return y


@functools.lru_cache(4096)
def choose_tile(num_rows: int, num_outputs: int, dtype: torch.dtype, *, is_large: bool) -> Tile:
    """The largest tile that leaves programs enough; `is_large` as of the device."""
    if dtype == torch.float32:
        return _FLOAT32
    for least, tile in tiles(is_large=is_large):
        count = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_outputs, tile.outputs)
        if count >= least and (num_rows > 64 or tile.rows == 64):
            break
    return tile


@functools.cache
def tiles(*, is_large: bool) -> list[tuple[int, Tile]]:
    """Those of 16 bits that a device has the memory for, with the least programs of each."""
    found = []
    for least, tile in _TILES:
        stage = 2 * (tile.rows + tile.outputs) * tile.inputs
        stages = min(tile.stages, (_LARGE_MEMORY if is_large else _MEMORY) // stage)
        if stages >= _LEAST_STAGES:
            found.append((least, tile._replace(stages=stages)))
    return found


@functools.cache
def is_large(device: torch.device) -> bool:
    """Whether programs may take 192 KiB of shared memory there."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device.index or 0).major in _LARGE


def _check(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_shape("x", x, "M", "K")
    check_shape("w", w, "N", x.shape[1])
    check_floating("x", x)
    check_dtype("w", w, x.dtype)
    check_rows(x=x)
    check_contiguous(w=w)
    check_device(x.device, w=w)
    if bias is not None:
        check_shape("bias", bias, w.shape[0])
        check_dtype("bias", bias, x.dtype)
        check_contiguous(bias=bias)
        check_device(x.device, bias=bias)
