"""Attention of up to four rows, as of a decoding token: bound by the reading of keys and values.

Keys are turned in registers, sixteen at a time, and not written anywhere. What is read next is
asked for well before, line by line beside the arithmetic: blocks lie anywhere, and their rows of
one head are not next to each other, which the processor does not foresee. The sums are those of
`compiled_attention.py`, in its order.
"""

import numpy as np
from numba import carray

from tokenmill.kernels.attention_vectors import clear, divide, scale, weigh
from tokenmill.kernels.cache_vectors import LINE, add_values, dots, prefetch
from tokenmill.kernels.compiler import has_wide_vectors, inner
from tokenmill.kernels.vectors import WIDTH, floats

#: Keys, or values, between what is computed and what is asked for: 32 does best for float32, 64
#: for bfloat16.
AHEAD = 48
#: Keys of a part, counted from the first key of a sequence: weights are of the highest score up to
#: their part, and what was summed up before is brought to it.
PART = 512
#: Channels of values at a time: as many as registers can hold the sums of.
_STRIP = 4 * WIDTH if has_wide_vectors() else WIDTH

#: By how many rows there are; numba calls no function of a list.
_dots_1, _dots_2, _dots_3, _dots_4 = (dots(rows, is_half=False) for rows in range(1, 5))
_half_dots_1, _half_dots_2, _half_dots_3, _half_dots_4 = (
    dots(rows, is_half=True, is_paired=True) for rows in range(1, 5)
)
_odd_half_dots = dots(4, is_half=True)
_strip_1, _strip_2, _strip_3, _strip_4 = (
    add_values(rows, _STRIP // WIDTH, is_half=False) for rows in range(1, 5)
)
_half_strip_1, _half_strip_2, _half_strip_3, _half_strip_4 = (
    add_values(rows, _STRIP // WIDTH, is_half=True) for rows in range(1, 5)
)
_vector, _half_vector = add_values(4, 1, is_half=False), add_values(4, 1, is_half=True)


@inner
def _score(size, rows, q, dim, keys, stride, scores, width, ahead):
    count = dim // WIDTH
    if size == 2:
        if count % 2:
            _odd_half_dots(q, dim, keys, stride, scores, width, count, ahead)
            return
        count //= 2
        if rows == 1:
            _half_dots_1(q, dim, keys, stride, scores, width, count, ahead)
        elif rows == 2:
            _half_dots_2(q, dim, keys, stride, scores, width, count, ahead)
        elif rows == 3:
            _half_dots_3(q, dim, keys, stride, scores, width, count, ahead)
        else:
            _half_dots_4(q, dim, keys, stride, scores, width, count, ahead)
    elif rows == 1:
        _dots_1(q, dim, keys, stride, scores, width, count, ahead)
    elif rows == 2:
        _dots_2(q, dim, keys, stride, scores, width, count, ahead)
    elif rows == 3:
        _dots_3(q, dim, keys, stride, scores, width, count, ahead)
    else:
        _dots_4(q, dim, keys, stride, scores, width, count, ahead)


@inner
def _add_strip(size, rows, weights, width, values, stride, sums, dim, count, ahead):
    if size == 2:
        if rows == 1:
            _half_strip_1(weights, width, values, stride, sums, dim, count, ahead)
        elif rows == 2:
            _half_strip_2(weights, width, values, stride, sums, dim, count, ahead)
        elif rows == 3:
            _half_strip_3(weights, width, values, stride, sums, dim, count, ahead)
        else:
            _half_strip_4(weights, width, values, stride, sums, dim, count, ahead)
    elif rows == 1:
        _strip_1(weights, width, values, stride, sums, dim, count, ahead)
    elif rows == 2:
        _strip_2(weights, width, values, stride, sums, dim, count, ahead)
    elif rows == 3:
        _strip_3(weights, width, values, stride, sums, dim, count, ahead)
    else:
        _strip_4(weights, width, values, stride, sums, dim, count, ahead)


@inner
def _add(size, rows, weights, width, values, stride, sums, dim, count, ahead):
    done = 0
    while done + _STRIP <= dim:
        at, to = values + size * done, sums + 4 * done
        _add_strip(size, rows, weights, width, at, stride, to, dim, count, ahead + size * done)
        done += _STRIP
    while done < dim:
        at, to = values + size * done, sums + 4 * done
        if size == 2:
            _half_vector(weights, width, at, stride, to, dim, count, ahead + size * done)
        else:
            _vector(weights, width, at, stride, to, dim, count, ahead + size * done)
        done += WIDTH


@inner
def _row(cache, row_bytes, table, block_size, position):
    """Address of the row of a position, of all heads."""
    return cache + (table[position // block_size] * block_size + position % block_size) * row_bytes


@inner
def ask_for(cache, row_bytes, table, block_size, position, last, length):
    """Of sixteen rows from `position` on, a multiple of sixteen, the `length` bytes of a head."""
    if position < last:
        first = _row(cache, row_bytes, table, block_size, position)
        for row in range(first, first + WIDTH * row_bytes, row_bytes):
            for byte in range(0, length, LINE):
                prefetch(row + byte)


@inner
def attend_few(at, table, scratch, shape, before, num_tokens, window, scale_at):
    """As `attend_many`, for at most four rows and blocks of whole vectors of keys."""
    q, keys, values, out = at
    size, block_size, num_kv_heads, dim, group, q_stride, out_stride = shape
    stride = num_kv_heads * dim
    row_bytes, length = size * stride, size * dim
    rows, last = num_tokens * group, before + num_tokens
    base = max(0, before - window + 1) // WIDTH * WIDTH
    sums = scratch + 16 * dim
    scores = sums + 16 * dim
    states = scores + 16 * PART

    for first in range(base, min(base + AHEAD, last), WIDTH):
        ask_for(keys, row_bytes, table, block_size, first, last, length)
    for row in range(rows):
        source = q + 4 * (row // group * q_stride + row % group * dim)
        scale(source, scratch + 4 * row * dim, dim // WIDTH, scale_at)
    clear(sums, 4 * dim // WIDTH)
    state = carray(floats(states), (4, 2))
    for row in range(4):  # loops: assigning to slices takes seconds to compile
        state[row, 0], state[row, 1] = -np.inf, 0

    part = base
    while part < last:
        stop = min(part // PART * PART + PART, last)
        for first in range(part, stop, WIDTH):
            at_keys = _row(keys, row_bytes, table, block_size, first)
            ahead, position = at_keys, first + AHEAD
            if position < stop:
                ahead = _row(keys, row_bytes, table, block_size, position)
            else:
                position = part + (position - stop) // WIDTH * WIDTH
                if position < stop:
                    ahead = _row(values, row_bytes, table, block_size, position)
            target = scores + 4 * (first - part)
            _score(size, rows, scratch, dim, at_keys, stride, target, PART, ahead)
        for row in range(rows):
            position = before + row // group
            low, high = max(0, position - window + 1 - part), min(position + 1, stop) - part
            row_scores = carray(floats(scores + 4 * row * PART), (PART,))
            if low >= high:
                clear(scores + 4 * row * PART, PART // WIDTH)
                continue
            end = (high + WIDTH - 1) // WIDTH * WIDTH
            for key in range(low):
                row_scores[key] = -np.inf
            for key in range(high, end):
                row_scores[key] = -np.inf
            for key in range(end, stop - part):
                row_scores[key] = 0
            sums_at = sums + 4 * row * dim
            weigh(scores + 4 * row * PART, end // WIDTH, states + 8 * row, sums_at, dim // WIDTH)
        for first in range(part, stop, WIDTH):
            at_values = _row(values, row_bytes, table, block_size, first)
            ahead, position = at_values, first + AHEAD
            if position < stop:
                ahead = _row(values, row_bytes, table, block_size, position)
            elif position < last:
                ahead = _row(keys, row_bytes, table, block_size, position)
            count, weights = min(WIDTH, stop - first), scores + 4 * (first - part)
            _add(size, rows, weights, PART, at_values, stride, sums, dim, count, ahead)
        part = stop

    for row in range(rows):
        target = out + 4 * (row // group * out_stride + row % group * dim)
        divide(sums + 4 * row * dim, target, dim // WIDTH, states + 8 * row + 4)
