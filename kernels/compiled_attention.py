"""`paged_attention` for the CPU, compiled: keys and values are read in their blocks.

An item of work is one KV head of some tokens of one sequence: their rows (the queries that share
the head) lie together in a scratch memory of the thread.

    scores  = q @ keys^T     64 keys at a time, transposed into the scratch
    weights = exp(scores - max), and their sum
    out     = weights @ values / sum

Every sum over keys or channels is taken in one order by one kernel, whatever is computed beside:
a row's bits are the same whole, in chunks, alone or in a batch. Keys that a row does not see weigh
0 exactly, and adding 0 changes nothing.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit, types

from tokenmill.kernels.cache_vectors import transpose_half, widen
from tokenmill.kernels.compiled_decode import ask_for, attend_few
from tokenmill.kernels.compiler import compiled, has_wide_vectors
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import (
    ROWS,
    WIDTH,
    fetch_add,
    floats,
    int32s,
    int64s,
    product,
    transpose,
    weigh,
)

#: Keys, and output channels, of a product at a time.
_TILE = 64
#: Rows of an item, and scores: half of a usual L2 cache.
_MOST_ROWS, _MOST_SCORES = 96, 1 << 17

#: Columns of a product at a time: as many as registers can hold the sums of.
_STRIP = _TILE if has_wide_vectors() else WIDTH
_score_strip = product(_STRIP // WIDTH, is_added=False)
_add_strip, _add_vector = product(_STRIP // WIDTH, is_added=True), product(1, is_added=True)


@njit(nogil=True)
def _padded(count, multiple):
    return (count + multiple - 1) // multiple * multiple


@njit(nogil=True)
def _tokens_of_item(context, group):
    """Tokens that an item has: as many as its rows' scores leave room for."""
    rows = min(_MOST_ROWS, max(ROWS, _MOST_SCORES // _padded(context, _TILE)))
    return max(1, rows // group)


@njit(nogil=True)
def _add_product(a, a_stride, b, b_stride, c, c_stride, count, width):
    done = 0
    while done + _STRIP <= width:
        _add_strip(a, a_stride, b + 4 * done, b_stride, c + 4 * done, c_stride, count)
        done += _STRIP
    while done < width:
        _add_vector(a, a_stride, b + 4 * done, b_stride, c + 4 * done, c_stride, count)
        done += WIDTH


@njit(nogil=True)
def _turn(keys, size, table, block_size, stride, first, last, dim, turned):
    """Transpose the keys from `first` on to [D, 64]; columns from `last` on may hold anything."""
    if block_size % WIDTH == 0:
        for position in range(first, min(first + _TILE, last), WIDTH):
            slot = table[position // block_size] * block_size + position % block_size
            for channel in range(0, dim, WIDTH):
                source = keys + size * (slot * stride + channel)
                target = turned + 4 * (channel * _TILE + position - first)
                if size == 2:
                    transpose_half(source, stride, target, _TILE)
                else:
                    transpose(source, stride, target, _TILE)
        return
    columns, widened = carray(floats(turned), (dim, _TILE)), turned + 4 * dim * _TILE
    for position in range(first, min(first + _TILE, last)):
        slot = table[position // block_size] * block_size + position % block_size
        source = keys + size * slot * stride
        if size == 2:
            widen(source, widened, dim // WIDTH)
            source = widened
        key = carray(floats(source), (dim,))
        for channel in range(dim):
            columns[channel, position - first] = key[channel]


@njit(nogil=True)
def _weigh_row(row, low, high, width):
    """The weights of the scores from `low` to `high`, the others 0; returns their sum."""
    scores = carray(floats(row), (width,))
    end = _padded(high, WIDTH)
    scores[:low] = -np.inf
    scores[high:end] = -np.inf
    scores[end:] = 0
    return weigh(row, end // WIDTH)


@njit(nogil=True)
def _attend(at, table, scratch, shape, before, num_tokens, window, scale):
    """One item: `num_tokens` behind the first `before` of a sequence.

    `at`: addresses of queries, keys, values and result, at the KV head of the item.
    `shape`: bytes of an element of the cache (4 or 2), block size, KV heads, channels, query heads
    that share one, strides of queries and result.
    """
    q, keys, values, out = at
    size, block_size, num_kv_heads, dim, group, q_stride, out_stride = shape
    stride = num_kv_heads * dim
    num_rows = num_tokens * group
    all_rows = _padded(num_rows, ROWS)
    last = before + num_tokens
    base = max(0, before - window + 1) // _TILE * _TILE
    width = _padded(last - base, _TILE)
    rows, turned = scratch, scratch + 4 * all_rows * dim
    sums = turned + 4 * dim * (_TILE + 1)
    scores = sums + 4 * all_rows * dim

    queries = carray(floats(rows), (all_rows, dim))
    for row in range(num_rows):
        source = q + 4 * (row // group * q_stride + row % group * dim)
        query = carray(floats(source), (dim,))
        for channel in range(dim):
            queries[row, channel] = query[channel] * scale
    queries[num_rows:] = 0
    carray(floats(sums), (all_rows * dim,))[:] = 0
    totals = carray(floats(scores + 4 * all_rows * width), (all_rows,))

    row_bytes, length, is_whole = size * stride, size * dim, block_size % WIDTH == 0
    for first in range(base, last, _TILE):
        if is_whole:
            for ahead in range(first + _TILE, first + 2 * _TILE, WIDTH):
                ask_for(keys, row_bytes, table, block_size, ahead, last, length)
                if ahead >= last:
                    begin = base + (ahead - last) // WIDTH * WIDTH
                    ask_for(values, row_bytes, table, block_size, begin, last, length)
        _turn(keys, size, table, block_size, stride, first, last, dim, turned)
        for row in range(0, all_rows, ROWS):
            if first <= before + (row + ROWS - 1) // group:  # else no row sees it
                target = scores + 4 * (row * width + first - base)
                for column in range(0, 4 * _TILE, 4 * _STRIP):
                    _score_strip(
                        rows + 4 * row * dim,
                        dim,
                        turned + column,
                        _TILE,
                        target + column,
                        width,
                        dim,
                    )
    for row in range(num_rows):
        position = before + row // group
        low, high = max(0, position - window + 1 - base), position + 1 - base
        totals[row] = _weigh_row(scores + 4 * row * width, low, high, width)
    carray(floats(scores), (all_rows, width))[num_rows:] = 0

    first = base
    while first < last:
        count = min(block_size - first % block_size, last - first, _TILE)
        if is_whole:
            for ahead in range(first + _TILE, first + _TILE + count, WIDTH):
                ask_for(values, row_bytes, table, block_size, ahead, last, length)
        slot = table[first // block_size] * block_size + first % block_size
        block, block_stride = values + size * slot * stride, stride
        if size == 2:
            for number in range(count):
                source = block + size * number * stride
                widen(source, turned + 4 * number * dim, dim // WIDTH)
            block, block_stride = turned, dim
        for row in range(0, all_rows, ROWS):
            if first <= before + (row + ROWS - 1) // group:
                weights = scores + 4 * (row * width + first - base)
                target = sums + 4 * row * dim
                _add_product(weights, width, block, block_stride, target, dim, count, dim)
        first += count

    attended = carray(floats(sums), (all_rows, dim))
    for row in range(num_rows):
        target = out + 4 * (row // group * out_stride + row % group * dim)
        result = carray(floats(target), (dim,))
        for channel in range(dim):
            result[channel] = attended[row, channel] / totals[row]


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (21,))
    q, keys, values, out = given[3], given[4], given[5], given[6]
    num_sequences, num_columns = given[7], given[8]
    starts = carray(int32s(given[9]), (num_sequences + 1,))
    contexts = carray(int32s(given[10]), (num_sequences,))
    tables = carray(int32s(given[11]), (num_sequences, num_columns))
    size, block_size, num_kv_heads, dim = given[20], given[12], given[13], given[14]
    group, q_stride = given[15], given[16]
    out_stride = num_kv_heads * group * dim
    shape = (size, block_size, num_kv_heads, dim, group, q_stride, out_stride)
    window, scratch_size = given[17], given[18]
    scratch = given[19] + 4 * scratch_size * fetch_add(data, 1)
    scale = np.float32(carray(int64s(data), (22,)).view(np.float64)[21])
    mine, index = fetch_add(data + 8, 1), 0
    for number in range(num_sequences):
        context, start = np.int64(contexts[number]), np.int64(starts[number])
        length = starts[number + 1] - start
        most = _tokens_of_item(context, group)
        is_whole = block_size % WIDTH == 0
        end = index + (length + most - 1) // most * num_kv_heads
        while mine < end:
            head, skipped = (mine - index) % num_kv_heads, (mine - index) // num_kv_heads * most
            row, channel = start + skipped, head * group * dim
            before, num_tokens = context - length + skipped, min(most, length - skipped)
            at = (
                q + 4 * (row * q_stride + channel),
                keys + size * head * dim,
                values + size * head * dim,
                out + 4 * (row * out_stride + channel),
            )
            table = tables[number]
            if is_whole and num_tokens * group <= ROWS:
                attend_few(at, table, scratch, shape, before, num_tokens, window, scale)
            else:
                _attend(at, table, scratch, shape, before, num_tokens, window, scale)
            mine = fetch_add(data + 8, 1)
        index = end


class _Scratch(threading.local):
    """Memory of the calling thread, kept: fresh pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def of(self, size: int) -> torch.Tensor:
        """At least `size` floats."""
        if self._buffer.numel() < size:
            with torch.inference_mode(mode=False):
                self._buffer = torch.empty(size)
        return self._buffer


_scratch = _Scratch()
#: What a cache may hold.
_CACHES = (torch.float32, torch.bfloat16)


def can_attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    **_others: object,
) -> bool:
    """Whether the arguments are such that `paged_attention` takes them."""
    return (  # no loops: it is asked in every layer
        not softcap
        and q.shape[-1] % WIDTH == 0
        and q.stride()[1:] == (q.shape[2], 1)
        and q.dtype == torch.float32
        and k_cache.dtype == v_cache.dtype
        and k_cache.dtype in _CACHES
        and cu_seqlens_q.dtype == context_lens.dtype == block_tables.dtype == torch.int32
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and cu_seqlens_q.is_contiguous()
        and context_lens.is_contiguous()
        and (out is None or (out.dtype == torch.float32 and out.is_contiguous()))
    )


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D] float32, D a multiple of 16
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D] float32 or bfloat16
    v_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D], the same
    *,
    cu_seqlens_q: torch.Tensor,  # [S + 1] int32
    context_lens: torch.Tensor,  # [S] int32
    block_tables: torch.Tensor,  # [S, B] int32
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,  # [T, Hq, D] float32, contiguous
) -> torch.Tensor:
    """As `reference.paged_attention`, but without a soft cap; returns [T, Hq, D].

    Raises:
        ValueError: arguments that `can_attend` says no to.
    """
    del max_query_len
    if not can_attend(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_tables=block_tables,
        softcap=softcap,
        out=out,
    ):
        raise ValueError(
            "compiled attention needs float32 rows, caches of float32 or bfloat16, int32 numbers, "
            "channels that are a multiple of 16, whole heads, contiguous caches and results, and "
            "no soft cap"
        )
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    tables = block_tables.contiguous()  # kept while its address is used
    values = step_values(q, k_cache, cu_seqlens_q, context_lens, tables)
    call = attention_call(q, k_cache, v_cache, out, scale, window, list(values.values()))
    run(call, q.shape[0] * k_cache.shape[2])  # no fewer than there are: a long chunk is several
    return out


#: The names of `step_values`.
STEP_VALUES = ("sequences", "columns", "starts", "contexts", "tables", "scratch_size", "scratch")


def step_values(
    q: torch.Tensor,  # [R, Hq, D]
    k_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,  # contiguous
) -> dict[str, int]:
    """What differs between calls with the same memory for rows, until the next call of this."""
    num_sequences, num_columns = block_tables.shape
    _, block_size, num_kv_heads, dim = k_cache.shape
    group = q.shape[1] // num_kv_heads
    width = num_columns * block_size + _TILE
    most_rows = max(_MOST_ROWS, group) + ROWS
    size = _MOST_SCORES + (group + 2 * ROWS) * width + most_rows * (2 * dim + 1) + (_TILE + 1) * dim
    size = -(-size // WIDTH) * WIDTH
    scratch = _scratch.of(size * torch.get_num_threads())
    addresses = [tensor.data_ptr() for tensor in (cu_seqlens_q, context_lens, block_tables)]
    values = (num_sequences, num_columns, *addresses, size, scratch.data_ptr())
    return dict(zip(STEP_VALUES, values, strict=True))


def attention_call(
    q: torch.Tensor,  # [R, Hq, D]
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,  # [R, Hq, D]
    scale: float,
    window: int | None,
    step: Sequence[int] | Sequence[str] = STEP_VALUES,
) -> Call:
    """`paged_attention` of the first rows; `step`: the `step_values`, or their names."""
    _, block_size, num_kv_heads, dim = k_cache.shape
    *batch, scratch_size, scratch = step
    return Call(
        _work,
        [
            *(tensor.data_ptr() for tensor in (q, k_cache, v_cache, out)),
            *batch,
            block_size,
            num_kv_heads,
            dim,
            q.shape[1] // num_kv_heads,
            q.stride(0),
            window or 1 << 40,
            scratch_size,
            scratch,
            k_cache.element_size(),
            float(scale),
        ],
    )
