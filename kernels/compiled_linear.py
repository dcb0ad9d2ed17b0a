"""`linear`: x @ weight.T for the CPU, compiled, in float32, on processors with AVX-512.

    weight [N, K]  is packed to panels [N / 64, K, 64]: a panel gives 64 columns of the product

An item of work is one panel with up to 32 rows; the panel comes from memory once and stays in the
core's cache meanwhile. A product is summed up over K in order, four rows at a time, whatever the
number of rows (they are filled up to four): its bits depend on the row and the weight alone.
"""

import torch
from numba import carray, types
from torch.nn.functional import pad as pad_rows

from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.parallel import run
from tokenmill.kernels.vectors import ROWS, WIDTH, fetch_add, int64s, product

_PANEL, _ITEM_ROWS = 64, 32
#: Terms of a sum taken at a time: that much of a panel is read again from the cache for all rows.
_TERMS = 576

_first, _further = product(_PANEL // WIDTH, is_added=False), product(_PANEL // WIDTH, is_added=True)


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (10,))
    num_rows, depth, num_panels = given[3], given[4], given[5]
    x, x_stride, packed, y = given[6], given[7], given[8], given[9]
    width = num_panels * _PANEL
    parts = (num_rows + _ITEM_ROWS - 1) // _ITEM_ROWS
    item = fetch_add(data + 8, 1)
    while item < num_panels * parts:
        number, start = item // parts, item % parts * _ITEM_ROWS
        for done in range(0, depth, _TERMS):
            count = min(_TERMS, depth - done)
            panel = packed + 4 * (number * depth + done) * _PANEL
            for row in range(start, min(start + _ITEM_ROWS, num_rows), ROWS):
                terms = x + 4 * (row * x_stride + done)
                target = y + 4 * (row * width + number * _PANEL)
                if done == 0:
                    _first(terms, x_stride, panel, _PANEL, target, width, count)
                else:
                    _further(terms, x_stride, panel, _PANEL, target, width, count)
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
    num_panels, depth, _ = packed.shape
    if num_rows % ROWS:
        x = pad_rows(x, (0, 0, 0, -num_rows % ROWS))
    elif x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape[0], num_panels * _PANEL)
    if num_rows:
        sizes = [x.shape[0], depth, num_panels]
        addresses = [x.data_ptr(), x.stride(0), packed.data_ptr(), y.data_ptr()]
        run(_work, [*sizes, *addresses], num_panels)
    y = y[:num_rows]
    return y if bias is None else y.add_(bias)
