"""Probabilities of a row of logits as vectors: computed, the highest added up, others dropped.

They are compared by their bits: floats that are not negative are in the order of their bits.
"""

from collections.abc import Callable
from typing import Any

from numba import types

from tokenmill.kernels.vectors import FLOAT, INDEX, INT, WIDTH, Emitter, as_function

#: Vectors that are added up side by side.
_ABREAST = 4
#: What the memory for probabilities is filled up to, with zeros.
STRIDE = _ABREAST * WIDTH


def _each(e: Emitter, size: Any, state: list[Any], body: Callable[[Any, list[Any]], Any]) -> Any:
    """`body(first, state)` for the vectors of `size` elements, the last of which may overlap."""
    last = e.builder.sub(size, INDEX(WIDTH))

    def at(number: Any, state: list[Any]) -> list[Any]:
        first = e.builder.mul(number, INDEX(WIDTH))
        is_inside = e.builder.icmp_signed("<", first, last)
        new: list[Any] = body(e.builder.select(is_inside, first, last), state)
        return new

    count = e.builder.sdiv(e.builder.add(size, INDEX(WIDTH - 1)), INDEX(WIDTH))
    return e.loop(count, state, at)


def _of_bits(e: Emitter, bits: Any) -> Any:
    return e.splat(e.builder.bitcast(e.builder.trunc(bits, INT), FLOAT))


def _weigh_row(e: Emitter, row: Any, target: Any, size: Any) -> None:
    def highest(first: Any, state: list[Any]) -> list[Any]:
        return [e.larger(e.load(e.step(row, first)), state[0])]

    (most,) = _each(e, size, [e.of(float("-inf"))], highest)
    most = e.splat(e.reduced(most, e.larger))

    def weigh(first: Any, state: list[Any]) -> list[Any]:
        e.store(e.exp(e.builder.fsub(e.load(e.step(row, first)), most)), e.step(target, first))
        return state

    _each(e, size, [], weigh)


#: Of (row, target, size): exp(x - max) of the `size` floats at `row`, at least 16: at most 1.
weigh_row = as_function(_weigh_row, types.void, 3)


def _above(e: Emitter, weights: Any, size: Any, bits: Any, *, is_counted: bool) -> Any:
    least = _of_bits(e, bits)

    def add(number: Any, sums: list[Any]) -> list[Any]:
        at = e.step(weights, e.builder.mul(number, INDEX(STRIDE)))
        new = []
        for n, total in enumerate(sums):
            weight = e.load(at, WIDTH * n)
            counts = e.of(1.0) if is_counted else weight
            is_above = e.builder.fcmp_ordered(">", weight, least)
            new.append(e.builder.fadd(total, e.builder.select(is_above, counts, e.of(0.0))))
        return new

    count = e.builder.sdiv(size, INDEX(STRIDE))
    one, two, three, four = e.loop(count, [e.of(0.0)] * _ABREAST, add)
    total = e.builder.fadd(e.builder.fadd(one, two), e.builder.fadd(three, four))
    return e.reduced(total, e.builder.fadd)


def _mass_above(e: Emitter, weights: Any, size: Any, bits: Any) -> Any:
    return _above(e, weights, size, bits, is_counted=False)


def _count_above(e: Emitter, weights: Any, size: Any, bits: Any) -> Any:
    return _above(e, weights, size, bits, is_counted=True)


#: Of (weights, size, bits): the sum of those that are above the float of these bits, or how many
#: they are; `size` is a multiple of `STRIDE`.
mass_above = as_function(_mass_above, types.float32, 3)
count_above = as_function(_count_above, types.float32, 3)


def _drop_below(e: Emitter, row: Any, weights: Any, size: Any, bits: Any) -> None:
    least = _of_bits(e, bits)

    def keep(first: Any, state: list[Any]) -> list[Any]:
        at = e.step(row, first)
        is_below = e.builder.fcmp_ordered("<", e.load(e.step(weights, first)), least)
        e.store(e.builder.select(is_below, e.of(float("-inf")), e.load(at)), at)
        return state

    _each(e, size, [], keep)


#: Of (row, weights, size, bits): -inf instead of the floats at `row` whose weights are below.
drop_below = as_function(_drop_below, types.void, 4)
