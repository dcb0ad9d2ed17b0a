"""`panel_product`: some rows times a part of a packed weight, in LLVM's instructions.

    c [rows, 64] = begin [rows, 64] + a [rows, count] @ panel [count, 64]

The tile of `linear`, and of adapters, whose panels are narrower: it stays in registers while the
terms go by, each a broadcast of `a` and the vectors of the panel. A sum goes over the terms in
order, whatever the rows of the tile.
"""

from typing import Any

from numba import types

from tokenmill.kernels.vectors import INDEX, WIDTH, Emitter, as_function

#: Columns of a panel, and the vectors or cache lines of 64 bytes that one of its rows is.
PANEL = 64
LINES = PANEL // WIDTH


def panel_product(rows: int, lines_ahead: int, lines: int = LINES) -> Any:
    """Of (a, a_stride, panel, begin, begin_stride, c, c_stride, count, ahead).

    They are addresses, and strides in floats; `begin` may be `c`, or one row for all with stride 0.

    A row of the panel is `lines` vectors. With each term, `lines_ahead` cache lines from `ahead` on
    are asked of memory.
    """

    def emit(
        e: Emitter,
        a: Any,
        a_stride: Any,
        panel: Any,
        begin: Any,
        begin_stride: Any,
        c: Any,
        c_stride: Any,
        count: Any,
        ahead: Any,
    ) -> None:
        def rows_of(address: Any, stride: Any) -> list[Any]:
            return [e.step(address, e.builder.mul(stride, INDEX(row))) for row in range(rows)]

        factors, outs = rows_of(a, a_stride), rows_of(c, c_stride)
        begins = rows_of(begin, begin_stride)
        sums = [e.load(row, WIDTH * n) for row in begins for n in range(lines)]

        def add(number: Any, state: list[Any]) -> list[Any]:
            term, line, *sums = state
            for n in range(lines_ahead):
                e.ask_for(line, WIDTH * n)
            loaded = [e.load(term, WIDTH * n) for n in range(lines)]
            new = [e.step(term, INDEX(WIDTH * lines)), e.step(line, INDEX(WIDTH * lines_ahead))]
            for row in range(rows):
                factor = e.spread(e.step(factors[row], number))
                new += [e.fma(factor, loaded[n], sums[row * lines + n]) for n in range(lines)]
            return new

        _, _, *sums = e.loop(count, [panel, ahead, *sums], add)
        for place, value in enumerate(sums):
            e.store(value, outs[place // lines], WIDTH * (place % lines))

    return as_function(emit, types.void, 9)
