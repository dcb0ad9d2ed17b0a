"""`paged_attention` for the CPU, compiled: keys and values are read in their blocks.

An item of work is one KV head of some tokens of one sequence; their rows are the queries that share
the head. Keys are taken in parts, whose ends are counted from a sequence's first key:

    scores  = q @ keys^T * log2(e)
    weights = 2^(scores - max), and their sum     max: up to this part; the sums so far are
    out     = weights @ values / sum              multiplied by 2^(max before - max)

Every sum over keys or channels is taken in one order, whatever is computed beside: a row's bits are
the same whole, in chunks, alone or in a batch. Keys that a row does not see weigh 0 exactly, and
adding 0 changes nothing.
"""

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, types

from tokenmill.kernels.attention_items import items
from tokenmill.kernels.compiled_chunk import attend_many, scratch_size
from tokenmill.kernels.compiled_decode import attend_few
from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import ROWS, WIDTH, fetch_add, int32s, int64s


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (21,))
    q, keys, values, out = given[3], given[4], given[5], given[6]
    num_items, num_columns = given[7], given[8]
    items, tables = given[9], given[10]
    size, block_size, num_kv_heads, dim = given[11], given[12], given[13], given[14]
    group, q_stride, window = given[15], given[16], given[17]
    out_stride = num_kv_heads * group * dim
    shape = (size, block_size, num_kv_heads, dim, group, q_stride, out_stride)
    scale_at = data + 8 * 18  # the float32 itself
    scratch = given[20] + 4 * given[19] * fetch_add(data, 1)
    mine = fetch_add(data + 8, 1)
    while mine < num_items:
        item = carray(int64s(items + 32 * (mine // num_kv_heads)), (4,))
        head, row, before, num_tokens = mine % num_kv_heads, item[1], item[2], item[3]
        channel = head * group * dim
        at = (
            q + 4 * (row * q_stride + channel),
            keys + size * head * dim,
            values + size * head * dim,
            out + 4 * (row * out_stride + channel),
        )
        table = carray(int32s(tables + 4 * item[0] * num_columns), (num_columns,))
        if num_tokens * group <= ROWS and block_size % WIDTH == 0:
            attend_few(at, table, scratch, shape, before, num_tokens, window, scale_at)
        else:
            attend_many(at, table, scratch, shape, before, num_tokens, window, scale_at)
        mine = fetch_add(data + 8, 1)


class _Kept(threading.local):
    """Memory of the calling thread, kept: fresh pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0, dtype=torch.float32)

    def scratch(self, size: int) -> torch.Tensor:
        """At least `size` floats."""
        if self._scratch.numel() < size:
            with torch.inference_mode(mode=False):
                self._scratch = torch.empty(size, dtype=torch.float32)
        return self._scratch


_kept = _Kept()
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
    held: list[object] = []
    values = step_values(q, k_cache, cu_seqlens_q, context_lens, block_tables, held=held)
    call = attention_call(q, k_cache, v_cache, out, scale, window, list(values.values()))
    run(call, values["num_items"])
    return out


#: The names of `step_values`.
STEP_VALUES = ("num_items", "columns", "items", "tables", "scratch_size", "scratch")


def step_values(
    q: torch.Tensor,  # [R, Hq, D]
    k_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    held: list[object],
) -> dict[str, int]:
    """What differs between calls with the same memory for rows.

    To `held` is added what has to live as long as they are used.
    """
    _, block_size, num_kv_heads, dim = k_cache.shape
    group, num_threads = q.shape[1] // num_kv_heads, torch.get_num_threads()
    tables = block_tables.contiguous()
    found = items(
        cu_seqlens_q,
        context_lens,
        group=group,
        num_kv_heads=num_kv_heads,
        most_few=ROWS if block_size % WIDTH == 0 else 0,
        num_threads=num_threads,
    )
    size = -(-scratch_size(dim, group) // WIDTH) * WIDTH
    scratch = _kept.scratch(size * num_threads)
    held += [tables, found, scratch]
    values = (
        len(found) * num_kv_heads,
        tables.shape[1],
        found.ctypes.data,
        tables.data_ptr(),
        size,
        scratch.data_ptr(),
    )
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
    *batch, floats, scratch = step
    return Call(
        _work,
        [
            *(tensor.data_ptr() for tensor in (q, k_cache, v_cache, out)),
            *batch,
            k_cache.element_size(),
            block_size,
            num_kv_heads,
            dim,
            q.shape[1] // num_kv_heads,
            q.stride(0),
            window or 1 << 40,
            # Weights are powers of two.
            int(np.float32(scale * math.log2(math.e)).view(np.uint32)),
            floats,
            scratch,
        ],
    )
