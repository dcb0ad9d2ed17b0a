"""`add_low_rank`: what adapters add to a linear's outputs, for the CPU, compiled, in float32.

    y[row] += (x[row] @ down.T) @ up.T      down [r, K], up [N, r] of the adapter of the row

    down  is packed to panels [r / 32, K, 32], filled up with zeros; up  to [N / 64, r, 64]

An item of work is some rows of one adapter, through both products. They need not lie together: a
tile is four rows that are equally far apart, or two, or one. Sums go over K and r in order, from
what y is: the bits depend on the row and the adapter alone. On processors with AVX-512.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled, inner
from tokenmill.kernels.panel_product import PANEL, panel_product
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import WIDTH, fetch_add, int64s

#: Vectors of a row of `down`'s panels, and their columns.
_LINES = 2
_NARROW = WIDTH * _LINES
#: Rows of a tile, and of an item, at the most.
_TILE, _MOST_ROWS = 4, 32
#: What the numbers of a step are called in a `Program`.
STEP_NAMES = (
    *("adapted items", "adapted items at", "adapted rows", "adapter places"),
    *("adapted linears", "low ranks", "low ranks a row"),
)

_ZEROS = torch.zeros(_NARROW, dtype=torch.float32)
_down_1, _down_2, _down_4 = (panel_product(rows, 0, _LINES) for rows in (1, 2, 4))
_up_1, _up_2, _up_4 = (panel_product(rows, 0) for rows in (1, 2, 4))


@inner
def _alike(rows, place, count):
    """How many rows from `place` on can be a tile: 4, 2 or 1."""
    if count - place < 2:
        return 1
    step = rows[place + 1] - rows[place]
    for number in range(2, 4):
        if place + number >= count or rows[place + number] - rows[place + number - 1] != step:
            return 2
    return 4


@inner
def _to_low(rows, count, x, x_stride, panel, zeros, low, low_stride, depth):
    """Low [count, 32] = x[rows] @ panel [depth, 32]."""
    place = 0
    while place < count:
        taken = _alike(rows, place, count)
        step = (rows[place + taken - 1] - rows[place]) // max(taken - 1, 1) * x_stride
        a, c = x + 4 * rows[place] * x_stride, low + 4 * place * low_stride
        if taken == 4:
            _down_4(a, step, panel, zeros, 0, c, low_stride, depth, panel)
        elif taken == 2:
            _down_2(a, step, panel, zeros, 0, c, low_stride, depth, panel)
        else:
            _down_1(a, step, panel, zeros, 0, c, low_stride, depth, panel)
        place += taken


@inner
def _add_up(rows, count, low, low_stride, panel, y, y_stride, ranks):
    """y[rows] [count, 64] += low [count, ranks] @ panel [ranks, 64]."""
    place = 0
    while place < count:
        taken = _alike(rows, place, count)
        step = (rows[place + taken - 1] - rows[place]) // max(taken - 1, 1) * y_stride
        a, c = low + 4 * place * low_stride, y + 4 * rows[place] * y_stride
        if taken == 4:
            _up_4(a, low_stride, panel, c, step, c, step, ranks, panel)
        elif taken == 2:
            _up_2(a, low_stride, panel, c, step, c, step, ranks, panel)
        else:
            _up_1(a, low_stride, panel, c, step, c, step, ranks, panel)
        place += taken


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (18,))
    num_items, items_at, rows_at, pairs_at = given[3], given[4], given[5], given[6]
    pair_stride, low_at, low_stride = given[7], given[8], given[9]
    x, x_stride, y, y_stride = given[10], given[11], given[12], given[13]
    depth, num_panels, number, zeros = given[14], given[15], given[16], given[17]
    item = fetch_add(data + 8, 1)
    while item < num_items:
        of_item = carray(int64s(items_at + 24 * item), (3,))
        adapter, first, count = of_item[0], of_item[1], of_item[2]
        pair = carray(int64s(pairs_at + 24 * (adapter * pair_stride + number)), (3,))
        down, up, ranks = pair[0], pair[1], pair[2]
        if ranks:
            rows = carray(int64s(rows_at + 8 * first), (count,))
            low = low_at + 4 * first * low_stride
            for panel in range((ranks + _NARROW - 1) // _NARROW):
                _to_low(
                    rows,
                    count,
                    x,
                    x_stride,
                    down + 4 * panel * depth * _NARROW,
                    zeros,
                    low + 4 * panel * _NARROW,
                    low_stride,
                    depth,
                )
            for panel in range(num_panels):
                _add_up(
                    rows,
                    count,
                    low,
                    low_stride,
                    up + 4 * panel * ranks * PANEL,
                    y + 4 * panel * PANEL,
                    y_stride,
                    ranks,
                )
        item = fetch_add(data + 8, 1)


@dataclass(frozen=True, slots=True)
class Panels:
    """What an adapter adds to a linear [K] -> [N], packed."""

    down: torch.Tensor  # [ceil(ranks / 32), K, 32]
    up: torch.Tensor  # [N / 64, ranks, 64]

    @property
    def place(self) -> tuple[int, int, int]:
        """Where both are, and how many ranks there are."""
        return self.down.data_ptr(), self.up.data_ptr(), self.up.shape[1]


#: `Panels.place` where an adapter adds nothing.
NO_PLACE = (0, 0, 0)


class AdaptedRows:
    """The rows of a step that adapters add to, as items; keeps the memory that `numbers` name."""

    def __init__(self, rows: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
        """Rows of each adapter, int64, no row in two; `pairs` [A, L, 3]: `Panels.place` of each.

        A: adapters of the step; L: linears.
        """
        counts = [len(of_adapter) for of_adapter in rows]
        each = -(-sum(counts) // torch.get_num_threads())
        most = max(min(-(-each // _TILE) * _TILE, _MOST_ROWS), _TILE)
        items: list[tuple[int, int, int]] = []
        first = 0
        for adapter, count in enumerate(counts):
            items += [
                (adapter, first + start, min(most, count - start))
                for start in range(0, count, most)
            ]
            first += count
        ranks = -(-int(pairs[:, :, 2].max()) // _NARROW) * _NARROW
        low = torch.empty(sum(counts), ranks, dtype=torch.float32)
        self._kept = torch.tensor(items), torch.cat(list(rows)), pairs.contiguous(), low
        addresses = [tensor.data_ptr() for tensor in self._kept]
        values = [len(items), *addresses[:3], pairs.shape[1], addresses[3], ranks]
        #: By the names of `STEP_NAMES`.
        self.numbers = dict(zip(STEP_NAMES, values, strict=True))


def pack(down: torch.Tensor, up: torch.Tensor) -> Panels:
    """Lay out down [r, K] and up [N, r] of float32, N a multiple of 64, in new memory."""
    ranks, depth = down.shape
    filled = torch.zeros(-(-ranks // _NARROW) * _NARROW, depth, dtype=torch.float32)
    filled[:ranks] = down
    panels = filled.view(-1, _NARROW, depth).transpose(1, 2).contiguous()
    return Panels(panels, up.view(-1, PANEL, ranks).transpose(1, 2).contiguous())


def add_low_rank(y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, panels: Panels) -> None:
    """y[rows] [R, N] += what an adapter makes of x[rows] [R, K]; `rows` int64, each once."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    step = AdaptedRows([rows], torch.tensor([[panels.place]]))
    run(low_rank_call(x, y, 0, step.numbers), step.numbers[STEP_NAMES[0]])


def low_rank_call(
    x: torch.Tensor, y: torch.Tensor, number: int, step: Mapping[str, int | str]
) -> Call:
    """What the adapters of a step add to linear `number`: by `AdaptedRows.numbers`, or names."""
    of_linear = [x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0)]
    shape = [x.shape[1], y.shape[1] // PANEL, number]
    return Call(
        _work, [*(step[name] for name in STEP_NAMES), *of_linear, *shape, _ZEROS.data_ptr()]
    )
