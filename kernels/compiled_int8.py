"""`linear` for the CPU, compiled, of weights of int8, on processors with AVX-512 VNNI.

    y[t, n] = w_scale[n] * sum_g x_scale[t, g] * sum_k xq[t, g, k] * w8[n, g, k]

Rows are quantized as they come, in groups of 64 values; the weight [N, K] is packed to panels
[N / 64, K / 4, 64, 4] of codes that are 128 too large, as the instruction takes unsigned by signed.
Work is divided as in `compiled_linear.py`: its bits depend on the row and the weight alone.
"""

import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.int8_vectors import GROUP, OFFSET, QUAD, product, quantize
from tokenmill.kernels.parallel import run
from tokenmill.kernels.vectors import ROWS, fetch_add, int64s

_PANEL, _ITEM_ROWS = 64, 32
#: Rows that a thread quantizes at a time.
_ROWS = 8


@compiled(types.void(types.int64))
def _quantize_work(data):
    given = carray(int64s(data), (10,))
    num_rows, groups, x, x_stride = given[3], given[4], given[5], given[6]
    codes, scales, totals = given[7], given[8], given[9]
    first = fetch_add(data + 8, 1) * _ROWS
    while first < num_rows:
        for row in range(first, min(first + _ROWS, num_rows)):
            done = row * groups
            source = x + 4 * row * x_stride
            quantize(source, codes + done * GROUP, scales + 4 * done, totals + 4 * done, groups)
        first = fetch_add(data + 8, 1) * _ROWS


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (12,))
    num_rows, groups, num_panels = given[3], given[4], given[5]
    codes, scales, totals = given[6], given[7], given[8]
    packed, weight_scales, y = given[9], given[10], given[11]
    width = num_panels * _PANEL
    parts = (num_rows + _ITEM_ROWS - 1) // _ITEM_ROWS
    item = fetch_add(data + 8, 1)
    while item < num_panels * parts:
        number, start = item // parts, item % parts * _ITEM_ROWS
        panel = packed + number * groups * GROUP * _PANEL
        of_panel = weight_scales + 4 * number * _PANEL
        for row in range(start, min(start + _ITEM_ROWS, num_rows), ROWS):
            done = row * groups
            target = y + 4 * (row * width + number * _PANEL)
            product(
                codes + done * GROUP,
                scales + 4 * done,
                totals + 4 * done,
                panel,
                of_panel,
                target,
                width,
                groups,
            )
        item = fetch_add(data + 8, 1)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `pack` takes the codes of a weight [N, K]."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and weight.shape[0] % _PANEL == 0 and weight.shape[1] % GROUP == 0


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Lay out int8 [N, K] as unsigned panels [N / 64, K / 4, 64, 4], in new memory."""
    num_columns, depth = codes.shape
    unsigned = codes.view(torch.uint8) ^ OFFSET  # the same as adding it
    quads = unsigned.view(num_columns // _PANEL, _PANEL, depth // QUAD, QUAD)
    return quads.transpose(1, 2).contiguous()


def linear(x: torch.Tensor, packed: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    """Return x [T, K] @ weight.T [K, N], float32; `weight_scales` [N]."""
    num_rows, depth = x.shape
    num_panels, groups = packed.shape[0], depth // GROUP
    if x.stride(-1) != 1:
        x = x.contiguous()
    filled = num_rows + -num_rows % ROWS  # what the last rows are filled up with goes nowhere
    held = torch.empty(filled * (depth + 8 * groups), dtype=torch.uint8)
    codes = held.data_ptr()
    scales = codes + filled * depth
    totals = scales + 4 * filled * groups
    y = torch.empty(filled, num_panels * _PANEL)
    if num_rows:
        quantized = [codes, scales, totals]
        sizes = [num_rows, groups, x.data_ptr(), x.stride(0)]
        run(_quantize_work, [*sizes, *quantized], -(-num_rows // _ROWS))
        addresses = [packed.data_ptr(), weight_scales.data_ptr(), y.data_ptr()]
        run(_work, [filled, groups, num_panels, *quantized, *addresses], num_panels)
    return y[:num_rows]
