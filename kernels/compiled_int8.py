"""`linear` for the CPU, compiled, of weights of int8, on processors with AVX-512 VNNI.

    y[t, n] = w_scale[n] * sum_g x_scale[t, g] * sum_k xq[t, g, k] * w8[n, g, k]

Rows are quantized as they come, in groups of 64 values; the weight [N, K] is packed to panels
[N / 64, K / 4, 64, 4] of codes that are 128 too large, as the instruction takes unsigned by signed.
An item of work is one panel with up to 32 rows: its bits depend on the row and the weight alone.
"""

import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled, inner
from tokenmill.kernels.int8_vectors import GROUP, OFFSET, QUAD, code_bytes, product, quantize
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import ROWS, fetch_add, floats, int64s

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


@inner
def _add_bias(bias_at, y, number, start, end, width):
    """Add a panel's part of the bias to rows from `start` to `end` of its part of y."""
    bias = carray(floats(bias_at + 4 * number * _PANEL), (_PANEL,))
    for row in range(start, end):
        sums = carray(floats(y + 4 * (row * width + number * _PANEL)), (_PANEL,))
        for column in range(_PANEL):
            sums[column] += bias[column]


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (13,))
    num_rows, groups, num_panels = given[3], given[4], given[5]
    codes, scales, totals = given[6], given[7], given[8]
    packed, weight_scales, y, bias_at = given[9], given[10], given[11], given[12]
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
        if bias_at:
            _add_bias(bias_at, y, number, start, min(start + _ITEM_ROWS, num_rows), width)
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


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x [T, K] @ weight.T [K, N] + bias [N], float32; `weight_scales` [N]."""
    num_rows, depth = x.shape
    num_panels = packed.shape[0]
    if x.stride(-1) != 1:
        x = x.contiguous()
    filled = num_rows + -num_rows % ROWS  # what the last rows are filled up with goes nowhere
    codes = torch.empty(code_bytes(filled, depth), dtype=torch.uint8)
    y = torch.empty(filled, num_panels * _PANEL, dtype=torch.float32)
    if num_rows:
        weight = (packed, weight_scales, bias)
        quantize_rows, multiply = linear_calls(x, *weight, y, codes, num_rows)
        run(quantize_rows, -(-num_rows // _ROWS))
        run(multiply, num_panels)
    return y[:num_rows]


def linear_calls(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    codes: torch.Tensor,  # uint8, `code_bytes` of the rows of y, which are a multiple of 4
    num_rows: int | str,
) -> tuple[Call, Call]:
    """The first rows of y [R, N] = x [R, K] @ weight.T + bias: what quantizes, what multiplies."""
    num_panels, groups = packed.shape[0], x.shape[1] // GROUP
    scales = codes.data_ptr() + y.shape[0] * groups * GROUP
    quantized = [codes.data_ptr(), scales, scales + 4 * y.shape[0] * groups]
    bias_at = 0 if bias is None else bias.data_ptr()
    addresses = [packed.data_ptr(), weight_scales.data_ptr(), y.data_ptr(), bias_at]
    return (
        Call(_quantize_work, [num_rows, groups, x.data_ptr(), x.stride(0), *quantized]),
        Call(_work, [num_rows, groups, num_panels, *quantized, *addresses]),
    )
