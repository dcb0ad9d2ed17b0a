"""Attention of many rows, as of a chunk of a prompt: bound by what the processor multiplies.

Keys are transposed, and values copied, 64 at a time to memory that stays in the first-level cache
while all rows use them. Rows lie together, those of a token first; what no row of a product sees
is left out of it.
"""

import numpy as np
from numba import carray

from tokenmill.kernels.attention_items import MOST_ROWS
from tokenmill.kernels.attention_vectors import clear, copy, divide, scale, weigh
from tokenmill.kernels.cache_vectors import transpose_half, widen
from tokenmill.kernels.compiled_decode import PART, ask_for
from tokenmill.kernels.compiler import has_wide_vectors, inner
from tokenmill.kernels.vectors import ROWS, WIDTH, floats, product, transpose

#: Keys, and output channels, of a product at a time.
TILE = 64
#: Floats between the scores of two rows: more than a part, which would share places in a cache.
_PITCH = PART + WIDTH
#: Columns of a product at a time: as many as registers can hold the sums of.
_STRIP = TILE if has_wide_vectors() else WIDTH
_score_strip, _score_vector = (product(count, is_added=False) for count in (_STRIP // WIDTH, 1))
_add_strip, _add_vector = (product(count, is_added=True) for count in (_STRIP // WIDTH, 1))


def scratch_size(dim: int, group: int) -> int:
    """Floats of memory that an item needs at the most."""
    most_rows = max(MOST_ROWS, group) + ROWS
    return most_rows * (2 * dim + 2 + _PITCH) + (TILE + 1) * dim


@inner
def padded(count, multiple):
    """`count` rounded up to a multiple."""
    return (count + multiple - 1) // multiple * multiple


@inner
def _turn(keys, size, table, block_size, stride, first, end, dim, turned):
    """Transpose the keys from `first` on to [D, 64]; columns from `end` on may hold anything."""
    if block_size % WIDTH == 0:
        for position in range(first, end, WIDTH):
            slot = table[position // block_size] * block_size + position % block_size
            for channel in range(0, dim, WIDTH):
                source = keys + size * (slot * stride + channel)
                target = turned + 4 * (channel * TILE + position - first)
                if size == 2:
                    transpose_half(source, stride, target, TILE)
                else:
                    transpose(source, stride, target, TILE)
        return
    columns, widened = carray(floats(turned), (dim, TILE)), turned + 4 * dim * TILE
    for position in range(first, end):
        slot = table[position // block_size] * block_size + position % block_size
        source = keys + size * slot * stride
        if size == 2:
            widen(source, widened, dim // WIDTH)
            source = widened
        key = carray(floats(source), (dim,))
        for channel in range(dim):
            columns[channel, position - first] = key[channel]


@inner
def _copy(values, size, table, block_size, stride, first, end, dim, copied):
    """Copy the values from `first` to `end` to float32 [64, D]."""
    for position in range(first, end):
        slot = table[position // block_size] * block_size + position % block_size
        source, target = values + size * slot * stride, copied + 4 * (position - first) * dim
        if size == 2:
            widen(source, target, dim // WIDTH)
        else:
            copy(source, target, dim // WIDTH)


@inner
def attend_many(at, table, scratch, shape, before, num_tokens, window, scale_at):
    """One item: `num_tokens` behind the first `before` of a sequence.

    `at`: addresses of queries, keys, values and result, at the KV head of the item.
    `shape`: bytes of an element of the cache (4 or 2), block size, KV heads, channels, query heads
    that share one, strides of queries and result.
    """
    q, keys, values, out = at
    size, block_size, num_kv_heads, dim, group, q_stride, out_stride = shape
    stride = num_kv_heads * dim
    num_rows = num_tokens * group
    all_rows = padded(num_rows, ROWS)
    last = before + num_tokens
    base = max(0, before - window + 1) // TILE * TILE
    rows, tile = scratch, scratch + 4 * all_rows * dim
    sums = tile + 4 * dim * (TILE + 1)
    scores = sums + 4 * all_rows * dim
    states = scores + 4 * all_rows * _PITCH

    for row in range(num_rows):
        source = q + 4 * (row // group * q_stride + row % group * dim)
        scale(source, rows + 4 * row * dim, dim // WIDTH, scale_at)
    for row in range(num_rows, all_rows):
        clear(rows + 4 * row * dim, dim // WIDTH)
    clear(sums, all_rows * dim // WIDTH)
    state = carray(floats(states), (all_rows, 2))
    for row in range(all_rows):  # loops: assigning to slices takes seconds to compile
        state[row, 0], state[row, 1] = -np.inf, 0

    row_bytes, length, is_whole = size * stride, size * dim, block_size % WIDTH == 0
    part = base
    while part < last:
        stop = min(part // PART * PART + PART, last)
        for first in range(part, stop, TILE):
            if is_whole:
                for ahead in range(first + TILE, first + 2 * TILE, WIDTH):
                    if ahead < stop:
                        ask_for(keys, row_bytes, table, block_size, ahead, last, length)
                    else:
                        begin = part + (ahead - stop) // WIDTH * WIDTH
                        ask_for(values, row_bytes, table, block_size, begin, last, length)
            _turn(keys, size, table, block_size, stride, first, min(first + TILE, last), dim, tile)
            for row in range(0, all_rows, ROWS):
                source, target = rows + 4 * row * dim, scores + 4 * (row * _PITCH + first - part)
                seen = min(TILE, before + (row + ROWS - 1) // group + 1 - first)
                column = 0
                while column + _STRIP <= seen:
                    place = 4 * column
                    _score_strip(source, dim, tile + place, TILE, target + place, _PITCH, dim)
                    column += _STRIP
                while column < seen:
                    place = 4 * column
                    _score_vector(source, dim, tile + place, TILE, target + place, _PITCH, dim)
                    column += WIDTH
        for row in range(all_rows):
            position = before + row // group
            low, high = max(0, position - window + 1 - part), min(position + 1, stop) - part
            if row >= num_rows or low >= high:
                clear(scores + 4 * row * _PITCH, PART // WIDTH)
                continue
            row_scores = carray(floats(scores + 4 * row * _PITCH), (PART,))
            end = padded(high, WIDTH)
            for key in range(low):
                row_scores[key] = -np.inf
            for key in range(high, end):
                row_scores[key] = -np.inf
            sums_at = sums + 4 * row * dim
            weigh(scores + 4 * row * _PITCH, end // WIDTH, states + 8 * row, sums_at, dim // WIDTH)
            clear(scores + 4 * (row * _PITCH + end), 1)  # what the rows beside it see
        for first in range(part, stop, TILE):
            end = min(first + TILE, stop)
            if is_whole:
                for ahead in range(first + TILE, first + 2 * TILE, WIDTH):
                    if ahead < stop:
                        ask_for(values, row_bytes, table, block_size, ahead, last, length)
                    else:
                        ask_for(keys, row_bytes, table, block_size, ahead, last, length)
            _copy(values, size, table, block_size, stride, first, end, dim, tile)
            for row in range(0, all_rows, ROWS):
                count = min(end, before + (row + ROWS - 1) // group + 1) - first
                if count > 0:  # else no row sees it
                    weights = scores + 4 * (row * _PITCH + first - part)
                    target, channel = sums + 4 * row * dim, 0
                    while channel + _STRIP <= dim:
                        place = 4 * channel
                        _add_strip(weights, _PITCH, tile + place, dim, target + place, dim, count)
                        channel += _STRIP
                    while channel < dim:
                        place = 4 * channel
                        _add_vector(weights, _PITCH, tile + place, dim, target + place, dim, count)
                        channel += WIDTH
        part = stop

    for row in range(num_rows):
        target = out + 4 * (row // group * out_stride + row % group * dim)
        divide(sums + 4 * row * dim, target, dim // WIDTH, states + 8 * row + 4)
