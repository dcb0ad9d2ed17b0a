"""Products of 8-bit integers, and the quantizing of their rows, in LLVM's instructions.

Rows are quantized in groups of 64 values, each with its scale. A group's integers add up exactly,
and the groups of a row are added in order: bits depend on the row and the weight alone.
"""

from typing import Any

from llvmlite import ir
from numba import types

from tokenmill.kernels.vectors import (
    FLOAT,
    INDEX,
    INT,
    INTS,
    ROWS,
    VECTOR,
    WIDTH,
    Emitter,
    as_function,
)

#: Values of a row that share a scale.
GROUP = 64
#: Values that one instruction multiplies and adds up to an element of a vector of int32.
QUAD = 4
#: The largest code of a row; what is added to a weight's codes to make them unsigned.
LEVELS, OFFSET = 127, 128

_VECTORS, _QUADS = GROUP // WIDTH, GROUP // QUAD
_CODES = ir.VectorType(ir.IntType(8), WIDTH)
#: Added to a float below 2^22 it leaves the nearest integer in the lower bits, and these above it.
_ROUND, _ROUND_BITS = 12582912.0, 0x4B400000
#: 1e-30: with a smaller largest value a group counts as zeros.
_LEAST_BITS = 0x0DA24260


def code_bytes(num_rows: int, depth: int) -> int:
    """Memory of rows [num_rows, depth] when quantized."""
    return num_rows * (depth + 8 * depth // GROUP)


def _ints(value: int) -> Any:
    return ir.Constant(INTS, [value] * WIDTH)


def _load_ints(e: Emitter, address: Any, offset: int = 0) -> Any:
    return e.builder.load(e.pointer(address, offset, kind=INTS), align=4)


def _spread_int(e: Emitter, address: Any) -> Any:
    """The int32 at `address` in every element."""
    value = e.builder.load(e.pointer(address, kind=INT), align=4)
    undefined = ir.Constant(INTS, ir.Undefined)
    first = e.builder.insert_element(undefined, value, INT(0))
    return e.builder.shuffle_vector(first, undefined, _ints(0))


def _quantize(e: Emitter, row: Any, codes: Any, scales: Any, totals: Any, groups: Any) -> None:
    builder = e.builder

    def larger(a: Any, b: Any) -> Any:
        return builder.select(builder.icmp_signed(">", a, b), a, b)

    def quantize(group: Any, state: list[Any]) -> list[Any]:
        begin = e.step(row, builder.mul(group, INDEX(GROUP)))
        values = [e.load(begin, WIDTH * n) for n in range(_VECTORS)]
        # As integers, absolute values are in the same order, and one that is not a number is first.
        most = _ints(_LEAST_BITS)
        for value in values:
            most = larger(builder.and_(builder.bitcast(value, INTS), _ints(0x7FFFFFFF)), most)
        largest = builder.bitcast(e.reduced(most, larger), FLOAT)
        inverse = e.splat(builder.fdiv(FLOAT(LEVELS), largest))
        total = _ints(0)
        target = builder.add(codes, builder.mul(group, INDEX(GROUP)))
        for n, value in enumerate(values):
            rounded = builder.bitcast(e.fma(value, inverse, e.of(_ROUND)), INTS)
            place = e.pointer(target, WIDTH // QUAD * n, kind=_CODES)
            builder.store(builder.trunc(rounded, _CODES), place, align=1)
            total = builder.add(total, builder.sub(rounded, _ints(_ROUND_BITS)))
        scale = builder.fdiv(largest, FLOAT(LEVELS))
        builder.store(scale, e.pointer(e.step(scales, group), kind=FLOAT), align=4)
        total = builder.mul(e.reduced(total, builder.add), INT(-OFFSET))
        builder.store(total, e.pointer(e.step(totals, group), kind=INT), align=4)
        return state

    e.loop(groups, [], quantize)


#: Of (row, codes, scales, totals, groups): addresses. Each group of 64 floats of the row to int8,
#: a scale, and -128 times the sum of its codes, which takes off what the weights are too large by.
quantize = as_function(_quantize, types.void, 5)


def _add_products(e: Emitter, sums: Any, unsigned: Any, signed: Any) -> Any:
    module, name = e.builder.module, "llvm.x86.avx512.vpdpbusd.512"
    kind = ir.FunctionType(INTS, [INTS] * 3)
    found = module.globals.get(name) or ir.Function(module, kind, name)
    return e.builder.call(found, [sums, unsigned, signed])


def _product(
    e: Emitter,
    codes: Any,
    scales: Any,
    totals: Any,
    panel: Any,
    weight_scales: Any,
    out: Any,
    out_stride: Any,
    groups: Any,
) -> None:
    builder = e.builder
    rows, row_scales, row_totals, outs = [codes], [scales], [totals], [out]
    for _ in range(ROWS - 1):
        rows.append(e.step(rows[-1], builder.mul(groups, INDEX(_QUADS))))
        row_scales.append(e.step(row_scales[-1], groups))
        row_totals.append(e.step(row_totals[-1], groups))
        outs.append(e.step(outs[-1], out_stride))

    def add_group(group: Any, state: list[Any]) -> list[Any]:
        panel, *sums = state
        begins = [e.step(row, builder.mul(group, INDEX(_QUADS))) for row in rows]
        first = [_spread_int(e, e.step(totals, group)) for totals in row_totals]

        def add_quad(number: Any, state: list[Any]) -> list[Any]:
            panel, *ints = state
            loaded = [_load_ints(e, panel, WIDTH * n) for n in range(_VECTORS)]
            new = [builder.add(panel, INDEX(GROUP * QUAD))]
            for row, begin in enumerate(begins):
                factor = _spread_int(e, e.step(begin, number))
                new += [
                    _add_products(e, ints[row * _VECTORS + n], loaded[n], factor)
                    for n in range(_VECTORS)
                ]
            return new

        start = [total for total in first for _ in range(_VECTORS)]
        panel, *ints = e.loop(INDEX(_QUADS), [panel, *start], add_quad)
        factors = [e.spread(e.step(scales, group)) for scales in row_scales]
        added = [
            e.fma(builder.sitofp(value, VECTOR), factors[place // _VECTORS], sums[place])
            for place, value in enumerate(ints)
        ]
        return [panel, *added]

    _, *sums = e.loop(groups, [panel, *[e.of(0.0)] * (ROWS * _VECTORS)], add_group)
    for place, value in enumerate(sums):
        row, n = place // _VECTORS, place % _VECTORS
        e.store(builder.fmul(value, e.load(weight_scales, WIDTH * n)), outs[row], WIDTH * n)


#: Of (codes, scales, totals, panel, weight_scales, out, out_stride, groups): four rows, as
#: `quantize` left them one after another, times a panel [K / 4, 64, 4] of unsigned codes.
product = as_function(_product, types.void, 8)
