"""`draw_row`: the token with the highest sum of logit and Gumbel noise, in LLVM's instructions.

    noise[t] = -log(-log(u[t])),   u[t] = (bits[t] >> 9 + 1/2) / 2^23
    bits[t] = mix(mix(t ^ low) + high)      mix: the 32-bit finaliser of MurmurHash3

Where a vector's logits are so low that no noise could make one of them the highest of its lane,
none is computed.
"""

from typing import Any

from llvmlite import ir
from numba import types

from tokenmill.kernels.vectors import FLOAT, INDEX, INT, INTS, VECTOR, WIDTH, Emitter, as_function

#: Noise is lower than that: it is 16.64 at the most.
_MOST_NOISE = 16.7
_BITS = ir.IntType(WIDTH)
_MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
#: log(1 + x) = x - x^2 / 2 + x^3 p(x) for sqrt(1/2) <= 1 + x < sqrt(2), from Cephes' logf.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2_HIGH, _LN2_LOW, _SQRT_HALF = 0.693359375, -2.12194440e-4, 0.707106781186547524


def _ints(value: int) -> Any:
    return ir.Constant(INTS, [value - (1 << 32) if value >= 1 << 31 else value] * WIDTH)


def _log(e: Emitter, x: Any) -> Any:
    """Of positive normal numbers."""
    b = e.builder
    bits = b.bitcast(x, INTS)
    exponent = b.sub(b.lshr(bits, _ints(23)), _ints(126))
    mantissa = b.or_(b.and_(bits, _ints(0x7FFFFF)), _ints(0x3F000000))
    mantissa = b.bitcast(mantissa, VECTOR)  # from 1/2 to 1
    is_low = b.fcmp_ordered("<", mantissa, e.of(_SQRT_HALF))
    power = b.sitofp(b.select(is_low, b.sub(exponent, _ints(1)), exponent), VECTOR)
    mantissa = b.select(is_low, b.fadd(mantissa, mantissa), mantissa)
    x = b.fsub(mantissa, e.of(1.0))
    square, value = b.fmul(x, x), e.of(_LOG[0])
    for factor in _LOG[1:]:
        value = e.fma(value, x, e.of(factor))
    value = b.fmul(b.fmul(value, x), square)
    value = e.fma(power, e.of(_LN2_LOW), value)
    value = e.fma(square, e.of(-0.5), value)
    return e.fma(power, e.of(_LN2_HIGH), b.fadd(x, value))


def _mix(e: Emitter, x: Any) -> Any:
    for shift, factor in _MIX:
        x = e.builder.xor(x, e.builder.lshr(x, _ints(shift)))
        if factor > 1:
            x = e.builder.mul(x, _ints(factor))
    return x


def _noise(e: Emitter, tokens: Any, low: Any, high: Any) -> Any:
    b = e.builder
    bits = _mix(e, b.add(_mix(e, b.xor(tokens, low)), high))
    uniform = b.uitofp(b.lshr(bits, _ints(9)), VECTOR)
    uniform = b.fmul(b.fadd(uniform, e.of(0.5)), e.of(2.0**-23))
    return b.fneg(_log(e, b.fneg(_log(e, uniform))))


def _spread(e: Emitter, number: Any) -> Any:
    """An int64's lower half in every element."""
    one = ir.Constant(INTS, ir.Undefined)
    one = e.builder.insert_element(one, e.builder.trunc(number, INT), INT(0))
    return e.builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * WIDTH))


def _draw_row(e: Emitter, row: Any, vocabulary: Any, low: Any, high: Any) -> Any:
    b = e.builder
    low, high = _spread(e, low), _spread(e, high)
    lanes = ir.Constant(INTS, list(range(WIDTH)))
    last = b.sub(vocabulary, INDEX(WIDTH))  # where the last vector begins: it may have been before

    def look(number: Any, state: list[Any]) -> list[Any]:
        best, where = state
        first = b.mul(number, INDEX(WIDTH))
        first = b.select(b.icmp_signed("<", first, last), first, last)
        logits = e.load(e.step(row, first))
        can_win = b.fcmp_ordered(">", b.fadd(logits, e.of(_MOST_NOISE)), best)
        begin, worth, after = b.block, b.append_basic_block("worth"), b.append_basic_block("looked")
        b.cbranch(b.icmp_unsigned("!=", b.bitcast(can_win, _BITS), _BITS(0)), worth, after)
        b.position_at_end(worth)
        tokens = b.add(lanes, _spread(e, first))
        drawn = b.fadd(logits, _noise(e, tokens, low, high))
        is_more = b.fcmp_ordered(">", drawn, best)
        changed = [b.select(is_more, drawn, best), b.select(is_more, tokens, where)]
        b.branch(after)
        b.position_at_end(after)
        new = [b.phi(old.type) for old in state]
        for phi, old, value in zip(new, state, changed, strict=True):
            phi.add_incoming(old, begin)
            phi.add_incoming(value, worth)
        return new

    state = [e.of(float("-inf")), _ints(0)]
    count = b.sdiv(b.add(vocabulary, INDEX(WIDTH - 1)), INDEX(WIDTH))
    best, where = e.loop(count, state, look)
    most = e.reduced(best, e.larger)  # finite, unless there were no numbers, or none to choose
    is_number = b.fcmp_ordered(">", most, ir.Constant(FLOAT, float("-inf")))
    # Of the highest, the first, as argmax has it.
    is_best = b.fcmp_ordered("==", best, e.splat(most))
    token = b.select(is_best, where, _ints(0x7FFFFFFF))
    smaller = e.reduced(token, lambda one, two: b.select(b.icmp_signed("<", one, two), one, two))
    return b.sext(b.select(is_number, smaller, INT(-1)), INDEX)


#: Of (row, vocabulary, low, high): the token of the logits at `row`, by a key in two halves; -1 if
#: all are -inf or no numbers.
draw_row = as_function(_draw_row, types.int64, 4)
