"""`linear`: x @ weight.T for the CPU, compiled, in float32, on processors with AVX-512.

    weight [N, K]  is packed to panels [N / 64, K, 64]: a panel gives 64 columns of the product

An item of work is one panel with up to 128 rows; the panel comes from memory once and stays in the
core's cache meanwhile. A product is summed up over K in order, four rows at a time, whatever the
number of rows (they are filled up to four): its bits depend on the row and the weight alone.
"""

import torch
from numba import carray, njit, types
from torch.nn.functional import pad as pad_rows

from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import ROWS, WIDTH, fetch_add, floats, int64s, product

_PANEL = 64
#: Rows of an item at the most, and the items that there should be at the least.
_MOST_ROWS, _FEWEST_ITEMS = 128, 24
#: Terms of a sum taken at a time: that much of a panel stays in the first-level cache for all rows.
_TERMS = 96
#: Cache lines of the next panel that are asked for with each term, so that they come from memory
#: meanwhile: by the first four rows of an item, or by its first sixteen.
_LINES, _ROWS_ASKING = _PANEL // WIDTH, ROWS * _PANEL // WIDTH

_first, _further = product(_LINES, is_added=False), product(_LINES, is_added=True)
_first_asking = product(_LINES, is_added=False, lines_ahead=1)
_further_asking = product(_LINES, is_added=True, lines_ahead=1)


@njit(nogil=True)
def _rows_of_item(num_rows, num_panels):
    """Rows of an item: all, if that makes items enough, or equal parts."""
    parts = max((num_rows + _MOST_ROWS - 1) // _MOST_ROWS, (_FEWEST_ITEMS - 1) // num_panels + 1)
    rows = (num_rows + parts - 1) // parts
    return (rows + ROWS - 1) // ROWS * ROWS


@njit(nogil=True)
def add_bias(bias_at, y, number, start, end, width):
    """Add a panel's part of the bias to rows from `start` to `end` of its part of y."""
    bias = carray(floats(bias_at + 4 * number * _PANEL), (_PANEL,))
    for row in range(start, end):
        sums = carray(floats(y + 4 * (row * width + number * _PANEL)), (_PANEL,))
        for column in range(_PANEL):
            sums[column] += bias[column]


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (11,))
    num_rows, depth, num_panels = given[3], given[4], given[5]
    x, x_stride, packed, y, bias_at = given[6], given[7], given[8], given[9], given[10]
    width = num_panels * _PANEL
    rows = _rows_of_item(num_rows, num_panels)
    parts = (num_rows + rows - 1) // rows
    item = fetch_add(data + 8, 1)
    while item < num_panels * parts:
        number, start = item // parts, item % parts * rows
        end = min(start + rows, num_rows)
        following = min(fetch_add(data + 8, 0), num_panels * parts - 1) // parts
        for done in range(0, depth, _TERMS):
            count = min(_TERMS, depth - done)
            panel = packed + 4 * (number * depth + done) * _PANEL
            # The next terms of this panel, or the first of the one that will probably come next.
            ahead = panel + 4 * count * _PANEL
            if done + count == depth:
                ahead = packed + 4 * following * depth * _PANEL
            for row in range(start, end, ROWS):
                terms = x + 4 * (row * x_stride + done)
                target = y + 4 * (row * width + number * _PANEL)
                if row < start + _ROWS_ASKING:
                    line = ahead + (row - start) // ROWS * count * 64
                    if done == 0:
                        _first_asking(terms, x_stride, panel, _PANEL, target, width, count, line)
                    else:
                        _further_asking(terms, x_stride, panel, _PANEL, target, width, count, line)
                elif done == 0:
                    _first(terms, x_stride, panel, _PANEL, target, width, count)
                else:
                    _further(terms, x_stride, panel, _PANEL, target, width, count)
        if bias_at:
            add_bias(bias_at, y, number, start, end, width)
        item = fetch_add(data + 8, 1)


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `pack` takes a weight [N, K]."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and weight.shape[0] % _PANEL == 0


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lay out a weight [N, K] as panels [N / 64, K, 64], in new memory."""
    num_columns, depth = weight.shape
    return weight.view(num_columns // _PANEL, _PANEL, depth).transpose(1, 2).contiguous()


def linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [T, K] @ weight.T [K, N] + bias [N]."""
    num_rows = x.shape[0]
    num_panels = packed.shape[0]
    if num_rows % ROWS:
        x = pad_rows(x, (0, 0, 0, -num_rows % ROWS))
    elif x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape[0], num_panels * _PANEL)
    if num_rows:
        run(linear_call(x, packed, bias, y, x.shape[0]), num_panels)
    return y[:num_rows]


def linear_call(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    num_rows: int | str,
) -> Call:
    """The first rows of y [R, N] = x [R, K] @ weight.T + bias; `num_rows` is a multiple of 4."""
    num_panels, depth, _ = packed.shape
    addresses = [x.data_ptr(), x.stride(0), packed.data_ptr(), y.data_ptr()]
    bias_at = 0 if bias is None else bias.data_ptr()
    return Call(_work, [num_rows, depth, num_panels, *addresses, bias_at])
