"""Vectors of a KV cache, which holds float32 or bfloat16; all arithmetic is in float32.

A bfloat16 is the upper half of a float32, so reading one is exact; writing rounds to the nearest,
and between two to the even one, as torch does. Strides of a cache are in elements of it.
"""

from typing import Any

from llvmlite import ir
from numba import types

from tokenmill.kernels.vectors import INDEX, INTS, VECTOR, WIDTH, Emitter, as_function, turned

_SHORT = ir.IntType(16)
_SHORTS = ir.VectorType(_SHORT, WIDTH)
#: Bytes of a cache line.
LINE = 64


def _of(value: int) -> Any:
    return ir.Constant(INTS, [value] * WIDTH)


def load(e: Emitter, address: Any, offset: int, *, is_half: bool) -> Any:
    """The vector `offset` elements behind `address`, as float32."""
    if not is_half:
        return e.load(address, offset)
    place = e.builder.add(address, INDEX(2 * offset)) if offset else address
    shorts = e.builder.load(e.builder.inttoptr(place, _SHORTS.as_pointer()), align=2)
    return e.builder.bitcast(e.builder.shl(e.builder.zext(shorts, INTS), _of(16)), VECTOR)


def _step(e: Emitter, address: Any, elements: Any, *, is_half: bool) -> Any:
    return e.builder.add(address, e.builder.mul(elements, INDEX(2 if is_half else 4)))


def add_values(rows: int, vectors: int, *, is_half: bool) -> Any:
    """Of (weights, weights_stride, values, values_stride, sums, sums_stride, count, ahead).

    sums [rows, 16 * vectors] += weights [rows, count] @ values [count, 16 * vectors], in order.
    Meanwhile as much of memory is asked for from `ahead` on, with the stride of values.
    """
    lines = max(1, vectors * WIDTH * (2 if is_half else 4) // LINE)

    def emit(
        e: Emitter,
        a: Any,
        a_stride: Any,
        b: Any,
        b_stride: Any,
        c: Any,
        c_stride: Any,
        count: Any,
        ahead: Any,
    ) -> None:
        starts, outs = [a], [c]
        for _ in range(rows - 1):
            starts.append(e.step(starts[-1], a_stride))
            outs.append(e.step(outs[-1], c_stride))

        def add(number: Any, state: list[Any]) -> list[Any]:
            value, line, *sums = state
            for n in range(lines):
                e.ask_for(line, WIDTH * n)
            loaded = [load(e, value, WIDTH * n, is_half=is_half) for n in range(vectors)]
            new = [_step(e, place, b_stride, is_half=is_half) for place in (value, line)]
            for row in range(rows):
                factor = e.spread(e.step(starts[row], number))
                new += [e.fma(factor, loaded[n], sums[row * vectors + n]) for n in range(vectors)]
            return new

        sums = [e.load(out, WIDTH * n) for out in outs for n in range(vectors)]
        _, _, *sums = e.loop(count, [b, ahead, *sums], add)
        for place, value in enumerate(sums):
            e.store(value, outs[place // vectors], WIDTH * (place % vectors))

    return as_function(emit, types.void, 8)


def _columns(e: Emitter, keys: list[Any], at: Any) -> list[Any]:
    """The columns of bfloat16 [16, 32], which are turned in pairs."""
    places = [_step(e, key, at, is_half=True) for key in keys]
    pairs = [e.builder.bitcast(e.load(place), INTS) for place in places]
    columns = []
    for pair in turned(e, pairs):
        columns.append(e.builder.bitcast(e.builder.shl(pair, _of(16)), VECTOR))
        columns.append(e.builder.bitcast(e.builder.and_(pair, _of(-0x10000)), VECTOR))
    return columns


def dots(rows: int, *, is_half: bool, is_paired: bool = False) -> Any:
    """Of (queries, queries_stride, keys, keys_stride, scores, scores_stride, count, ahead).

    scores [rows, 16] = queries [rows, W * count] @ keys [16, W * count]^T, channels in order.
    W is 16, or 32 if bfloat16 is paired. Meanwhile as much of memory is asked for from `ahead` on,
    with the stride of keys.
    """
    step = 2 * WIDTH if is_paired else WIDTH

    def emit(
        e: Emitter,
        q: Any,
        q_stride: Any,
        k: Any,
        k_stride: Any,
        c: Any,
        c_stride: Any,
        count: Any,
        ahead: Any,
    ) -> None:
        starts, outs, keys, lines = [q], [c], [k], [ahead]
        for _ in range(rows - 1):
            starts.append(e.step(starts[-1], q_stride))
            outs.append(e.step(outs[-1], c_stride))
        for _ in range(WIDTH - 1):
            keys.append(_step(e, keys[-1], k_stride, is_half=is_half))
            lines.append(_step(e, lines[-1], k_stride, is_half=is_half))

        def add(number: Any, sums: list[Any]) -> list[Any]:
            at = e.builder.mul(number, INDEX(step))
            for line in lines:
                e.ask_for(_step(e, line, at, is_half=is_half))
            if is_paired:
                columns = _columns(e, keys, at)
            else:
                places = [_step(e, key, at, is_half=is_half) for key in keys]
                columns = turned(e, [load(e, place, 0, is_half=is_half) for place in places])
            for channel, column in enumerate(columns):
                sums = [
                    e.fma(e.spread(e.step(start, at), channel), column, total)
                    for start, total in zip(starts, sums, strict=True)
                ]
            return sums

        for out, total in zip(outs, e.loop(count, [e.of(0.0)] * rows, add), strict=True):
            e.store(total, out)

    return as_function(emit, types.void, 8)


def _transpose_half(e: Emitter, source: Any, stride: Any, target: Any, target_stride: Any) -> None:
    rows = []
    for _ in range(WIDTH):
        rows.append(load(e, source, 0, is_half=True))
        source = _step(e, source, stride, is_half=True)
    for row in turned(e, rows):
        e.store(row, target)
        target = e.step(target, target_stride)


#: Of (source, stride, target, target_stride): float32 [16, 16] of bfloat16 [16, 16] transposed.
transpose_half = as_function(_transpose_half, types.void, 4)


def _widen(e: Emitter, source: Any, target: Any, count: Any) -> None:
    def body(number: Any, state: list[Any]) -> list[Any]:
        at = e.builder.mul(number, INDEX(WIDTH))
        e.store(load(e, _step(e, source, at, is_half=True), 0, is_half=True), e.step(target, at))
        return state

    e.loop(count, [], body)


#: Of (source, target, count): `count` vectors of bfloat16 as float32.
widen = as_function(_widen, types.void, 3)


def _narrow(e: Emitter, source: Any, target: Any, count: Any) -> None:
    def body(number: Any, state: list[Any]) -> list[Any]:
        at = e.builder.mul(number, INDEX(WIDTH))
        value = e.load(e.step(source, at))
        bits = e.builder.bitcast(value, INTS)
        upper = e.builder.lshr(bits, _of(16))
        odd = e.builder.and_(upper, _of(1))
        rounded = e.builder.lshr(e.builder.add(e.builder.add(bits, _of(0x7FFF)), odd), _of(16))
        # Rounding up may carry the bits of a NaN away.
        is_nan = e.builder.fcmp_unordered("uno", value, value)
        rounded = e.builder.select(is_nan, e.builder.or_(upper, _of(0x40)), rounded)
        place = e.builder.inttoptr(_step(e, target, at, is_half=True), _SHORTS.as_pointer())
        e.builder.store(e.builder.trunc(rounded, _SHORTS), place, align=2)
        return state

    e.loop(count, [], body)


#: Of (source, target, count): `count` vectors of float32 rounded to bfloat16.
narrow = as_function(_narrow, types.void, 3)


#: Of an address: have its cache line read; one that is not mapped does no harm.
prefetch = as_function(Emitter.ask_for, types.void, 1)
