"""`linear`: x @ weight.T for the CPU, compiled, in float32, on processors with AVX-512.

    weight [N, K]  is packed to panels [N / 64, K, 64] by `compiled_panels.py`, of 64 columns each

An item of work is one panel with up to 128 rows: the panel comes from memory once, to one core, and
stays in its cache meanwhile. What is left when each thread has had as many of these goes in parts.
A product is summed up over K in order, whatever the number of rows: its bits depend on the row and
the weight alone.
"""

import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled, inner
from tokenmill.kernels.panel_product import LINES, PANEL, panel_product
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import fetch_add, int64s

#: Rows of a tile, and of an item, at the most.
_TILE, _MOST_ROWS = 4, 128
#: Parts, for each thread, of an item that is left over.
_PARTS = 2
#: Terms of a sum taken at a time: that much of a panel stays in the first-level cache for all rows.
_TERMS = 96
#: Arguments behind the counters and the 0 of a `Call`.
_NUM_GIVEN = 10

#: Where the sums of a panel begin that has no bias.
_ZEROS = torch.zeros(PANEL, dtype=torch.float32)

# The next part of a panel is asked of memory by the first tiles of this one, in equal shares. One
# tile alone asks for a quarter: it is through so soon that the processor's own guesses do better.
_tile, _tile_1, _tile_2 = (panel_product(_TILE, lines) for lines in (0, 1, 2))
_row_1, _row_2, _row_3 = (panel_product(rows, 0) for rows in (1, 2, 3))


@inner
def _multiply(num_rows, x, x_stride, panel, begin, begin_stride, y, y_stride, count, ahead):
    """Y [num_rows, 64] = begin + x [num_rows, count] @ panel; asks for what lies `ahead`."""
    tiles = num_rows // _TILE
    for number in range(tiles + 1):
        row = number * _TILE
        a, c = x + 4 * row * x_stride, y + 4 * row * y_stride
        b = begin + 4 * row * begin_stride
        if number == tiles:
            if num_rows - row == 1:
                _row_1(a, x_stride, panel, b, begin_stride, c, y_stride, count, ahead)
            elif num_rows - row == 2:
                _row_2(a, x_stride, panel, b, begin_stride, c, y_stride, count, ahead)
            elif num_rows - row == 3:
                _row_3(a, x_stride, panel, b, begin_stride, c, y_stride, count, ahead)
        elif 1 < tiles < LINES:
            line = ahead + 2 * 64 * count * min(number, 1)
            _tile_2(a, x_stride, panel, b, begin_stride, c, y_stride, count, line)
        elif number < LINES:
            line = ahead + 64 * count * number
            _tile_1(a, x_stride, panel, b, begin_stride, c, y_stride, count, line)
        else:
            _tile(a, x_stride, panel, b, begin_stride, c, y_stride, count, ahead)


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (3 + _NUM_GIVEN,))
    num_rows, depth, num_panels, num_threads = given[3], given[4], given[5], given[6]
    x, x_stride, packed, y = given[7], given[8], given[9], given[10]
    bias, bias_step = given[11], given[12]
    y_stride = num_panels * PANEL
    blocks = (num_rows + _MOST_ROWS - 1) // _MOST_ROWS
    units = num_panels * blocks
    block = ((num_rows + blocks - 1) // blocks + _TILE - 1) // _TILE * _TILE
    whole = units - units % num_threads
    parts = min(_PARTS * num_threads, block // _TILE)
    part = (block // _TILE + parts - 1) // parts * _TILE
    item = fetch_add(data + 8, 1)
    while item < whole + (units - whole) * parts:
        unit, first, rows = item, 0, block
        if item >= whole:
            unit = whole + (item - whole) // parts
            first, rows = (item - whole) % parts * part, part
        number = unit // blocks
        start = min(unit % blocks * block + first, num_rows)
        rows = min(rows, block - first, num_rows - start)
        target = y + 4 * (start * y_stride + number * PANEL)
        if rows > 0:
            begin, begin_stride = bias + 4 * number * bias_step, 0
            following = min(fetch_add(data + 8, 0), units - 1) // blocks
            for done in range(0, depth, _TERMS):
                count = min(_TERMS, depth - done)
                panel = packed + 4 * (number * depth + done) * PANEL
                # The next terms of this panel, or the first of the one that will probably be next.
                ahead = panel + 4 * count * PANEL
                if done + count == depth:
                    ahead = packed + 4 * following * depth * PANEL
                terms = x + 4 * (start * x_stride + done)
                _multiply(
                    rows,
                    terms,
                    x_stride,
                    panel,
                    begin,
                    begin_stride,
                    target,
                    y_stride,
                    count,
                    ahead,
                )
                begin, begin_stride = target, y_stride
        item = fetch_add(data + 8, 1)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether a weight [N, K] can be packed."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and weight.shape[0] % PANEL == 0


def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [T, K] @ weight.T [K, N] + bias [N]."""
    num_rows, num_panels = x.shape[0], packed.shape[0]
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(num_rows, num_panels * PANEL, dtype=torch.float32)
    if num_rows:
        run(linear_call(x, packed, bias, y, num_rows), num_panels)
    return y


def linear_call(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    num_rows: int | str,
) -> Call:
    """The first rows of y [R, N] = x [R, K] @ weight.T + bias."""
    num_panels, depth, _ = packed.shape
    addresses = [x.data_ptr(), x.stride(0), packed.data_ptr(), y.data_ptr()]
    begin = [_ZEROS.data_ptr(), 0] if bias is None else [bias.data_ptr(), PANEL]
    num_threads = torch.get_num_threads()
    return Call(_work, [num_rows, depth, num_panels, num_threads, *addresses, *begin])
