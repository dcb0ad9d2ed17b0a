"""Rows of attention as vectors: scaled queries, weights, copied values, results."""

from typing import Any

from llvmlite import ir
from numba import types

from tokenmill.kernels.vectors import FLOAT, INDEX, INT, INTS, VECTOR, WIDTH, Emitter, as_function

#: 2^r for |r| <= 1/2, within 2e-9 of it: the least that the largest relative error can be.
_POWER_OF_TWO = (
    1.5594677015e-04,
    1.3406643847e-03,
    9.6176929761e-03,
    5.5503105512e-02,
    2.4022652783e-01,
    6.9314721497e-01,
    1.0,
)
#: What is added to a float that it be rounded to a whole number; the least exponent.
_ROUNDING, _LEAST_POWER = 1.5 * 2.0**23, -126.0


def _power_of_two(e: Emitter, x: Any) -> Any:
    """2^x for x <= 0; below the normal numbers 0."""
    is_normal = e.builder.fcmp_unordered(">=", x, e.of(_LEAST_POWER))  # or no number
    whole = e.builder.fadd(x, e.of(_ROUNDING))
    rest = e.builder.fsub(x, e.builder.fsub(whole, e.of(_ROUNDING)))
    value = e.of(_POWER_OF_TWO[0])
    for factor in _POWER_OF_TWO[1:]:
        value = e.fma(value, rest, e.of(factor))
    exponent = e.builder.shl(e.builder.bitcast(whole, INTS), ir.Constant(INTS, [23] * WIDTH))
    bits = e.builder.add(e.builder.bitcast(value, INTS), exponent)
    bits = e.builder.select(is_normal, bits, ir.Constant(INTS, [0] * WIDTH))
    return e.builder.bitcast(bits, VECTOR)


def _weigh(e: Emitter, row: Any, count: Any, state: Any, sums: Any, channels: Any) -> None:
    def at(address: Any, number: Any) -> Any:
        return e.step(address, e.builder.mul(number, INDEX(WIDTH)))

    def highest(number: Any, state: list[Any]) -> list[Any]:
        return [e.larger(e.load(at(row, number)), state[0])]

    before = e.spread(state)
    (most,) = e.loop(count, [before], highest)
    highest_score = e.reduced(most, e.larger)
    most = e.splat(highest_score)

    def weigh(number: Any, state: list[Any]) -> list[Any]:
        weights = _power_of_two(e, e.builder.fsub(e.load(at(row, number)), most))
        e.store(weights, at(row, number))
        return [e.builder.fadd(state[0], weights)]

    (total,) = e.loop(count, [e.of(0.0)], weigh)
    total = e.splat(e.reduced(total, e.builder.fadd))
    less = _power_of_two(e, e.builder.fsub(before, most))
    total = e.fma(e.spread(state, 1), less, total)

    def lessen(number: Any, state: list[Any]) -> list[Any]:
        e.store(e.builder.fmul(e.load(at(sums, number)), less), at(sums, number))
        return state

    e.loop(channels, [], lessen)
    e.builder.store(highest_score, e.pointer(state, kind=FLOAT), align=4)
    total = e.builder.extract_element(total, INT(0))
    e.builder.store(total, e.pointer(state, 1, kind=FLOAT), align=4)


#: Of (row, count, state, sums, channels): weights 2^(x - max) of the `count` vectors of scores at
#: `row`, in place. The state of a row is the highest score so far, which max is or becomes, and the
#: sum of the weights; that and the `channels` vectors of sums at `sums` are brought to the new max.
weigh = as_function(_weigh, types.void, 5)


def _copy(e: Emitter, source: Any, target: Any, count: Any) -> None:
    def body(number: Any, state: list[Any]) -> list[Any]:
        at = e.builder.mul(number, INDEX(WIDTH))
        e.store(e.load(e.step(source, at)), e.step(target, at))
        return state

    e.loop(count, [], body)


#: Of (source, target, count): `count` vectors copied.
copy = as_function(_copy, types.void, 3)


def _scale(e: Emitter, source: Any, target: Any, count: Any, factor_at: Any) -> None:
    factor = e.spread(factor_at)

    def body(number: Any, state: list[Any]) -> list[Any]:
        at = e.builder.mul(number, INDEX(WIDTH))
        e.store(e.builder.fmul(e.load(e.step(source, at)), factor), e.step(target, at))
        return state

    e.loop(count, [], body)


#: Of (source, target, count, factor_at): `count` vectors times the float at `factor_at`.
scale = as_function(_scale, types.void, 4)


def _divide(e: Emitter, source: Any, target: Any, count: Any, divisor_at: Any) -> None:
    divisor = e.spread(divisor_at)

    def body(number: Any, state: list[Any]) -> list[Any]:
        at = e.builder.mul(number, INDEX(WIDTH))
        e.store(e.builder.fdiv(e.load(e.step(source, at)), divisor), e.step(target, at))
        return state

    e.loop(count, [], body)


#: Of (source, target, count, divisor_at): `count` vectors divided by the float at `divisor_at`.
divide = as_function(_divide, types.void, 4)


def _clear(e: Emitter, target: Any, count: Any) -> None:
    def body(number: Any, state: list[Any]) -> list[Any]:
        e.store(e.of(0.0), e.step(target, e.builder.mul(number, INDEX(WIDTH))))
        return state

    e.loop(count, [], body)


#: Of (target, count): `count` vectors of zeros.
clear = as_function(_clear, types.void, 2)
