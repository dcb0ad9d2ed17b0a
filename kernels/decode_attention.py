"""Attention of the chunks of one query, those of sequences that decode, in Triton.

    out[i] = softmax(scale * q[i] . K[0 .. n - 1]) V[0 .. n - 1],
    i = cu_seqlens_q[s],  n = context_lens[s],  for every chunk s of length 1

with the window and the soft cap of `paged_attention.py`, whose table of arguments holds here. Other
chunks are left to that kernel: which is which is seen on the device, so that both can be in one
CUDA graph for any mixture.

The keys are taken in parts of PART positions, counted from position 0, and a program takes one KV
head of some parts in a row, so that one long sequence keeps the whole device busy:

    keys          0 ........ 255 | 256 ...... 511 | 512 ...... 767 | 768 ... n - 1
    2 a program   program 0                         program 1

The G query heads that share the KV head are the rows of its tile. Parts are merged in an order that
depends on positions alone (`merge_parts.py`). A program that takes a group of them merges it, and
if that is all there is the result is its own; else a second kernel goes on, by the same operations:
a row has the same bits alone, in any batch, with any number of parts a program, at any width of the
tables.

The grid is bound by what the block tables can hold, known on the host; programs of parts that a
sequence does not have leave at once. No length is read back, so the launch can be in a CUDA graph.

Memory-bound: 2 * Hkv * D * n elements of the cache are read once.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.attention_tile import (
    LOG2_E,
    add_scores,
    block_at,
    cap_scores,
    mask_scores,
    read_tile,
)
from tokenmill.kernels.checks import check_divisible
from tokenmill.kernels.merge_parts import GROUP, merge_part, merge_parts
from tokenmill.kernels.paged_attention import check_attention
from tokenmill.kernels.tiles import Tile, choose_tile, num_processors

#: Positions of a part. Results depend on it in their last bits: one number for all batches.
PART = 256


@triton.jit(do_not_specialize=["table_row", "parts", "num_states", "is_merged"])
def _decode_parts_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,  # where a program has all of a sequence
    sums_ptr,  # else: [S, Hq, num_states, 2] float32: highest and total of each part or group
    means_ptr,  # [S, Hq, num_states, D] float32
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    score_scale,  # scale * log2(e); CAPPED: scale / cap
    cap_log2,  # cap * log2(e)
    q_token,  # strides in elements
    q_head,
    out_token,
    out_head,
    table_row,
    parts,  # of a program
    num_states,  # of a row; 0: a program has all of a sequence
    is_merged,  # a program's parts are a group
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    # What has to be known before keys can be read is asked for at once.
    context = tl.load(context_lens_ptr + seq)
    token = tl.load(cu_seqlens_q_ptr + seq)
    next_token = tl.load(cu_seqlens_q_ptr + seq + 1)
    table = block_tables_ptr + seq * table_row
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - WINDOW, 0) // TILE * TILE
    chunk = begin // (PART * parts) + tl.program_id(1)
    begin = tl.maximum(begin, chunk * (PART * parts))
    block = 0
    if WINDOW == 0:  # the grid ends where the tables do
        block = tl.load(table + begin // BLOCK_SIZE)
    end = tl.minimum(context, (chunk + 1) * (PART * parts))
    if (begin >= end) | (next_token - token != 1):
        return
    if WINDOW:
        block = block_at(table, begin, context, BLOCK_SIZE)

    rows = tl.arange(0, BLOCK_M)
    head = kv_head * G + rows
    channels = tl.arange(0, BLOCK_D)
    inside = (rows < G)[:, None] & (channels < D)[None, :]
    q_offsets = token.to(tl.int64) * q_token + head[:, None] * q_head + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    if k_cache_ptr.dtype.element_ty.primitive_bitwidth == 8 and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # holds fp8 as well, and one instruction makes two of them
    query_position = tl.full([BLOCK_M], 0, tl.int32) + context - 1
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    all_highest = tl.full([BLOCK_M], -1e30, tl.float32)
    all_total = total
    all_mean = mean
    for tile_start in range(begin, end, TILE):
        k = read_tile(
            k_cache_ptr, table, block, tile_start, context, kv_head,
            Hkv, D, BLOCK_SIZE, BLOCK_D, TILE, False,
        )  # fmt: skip
        v = read_tile(
            v_cache_ptr, table, block, tile_start, context, kv_head,
            Hkv, D, BLOCK_SIZE, BLOCK_D, TILE, True,
        )  # fmt: skip
        block = block_at(table, tile_start + TILE, context, BLOCK_SIZE)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        scale = score_scale
        if CAPPED:
            scores = cap_scores(scores, score_scale, cap_log2)
            scale = 1.0
        at_edge = tile_start + TILE > context
        if WINDOW:
            at_edge = at_edge | (tile_start < context - WINDOW)
        if at_edge:
            scores = mask_scores(scores, query_position, tile_start, WINDOW, TILE)
        weights, shrink, highest, total = add_scores(scores, highest, total, scale, WINDOW)
        mean = mean * shrink[:, None]
        mean = tl.dot(weights.to(q.dtype), v.to(q.dtype), mean, input_precision=PRECISION)
        if ((tile_start + TILE) % PART == 0) | (tile_start + TILE >= end):  # the part's end
            if is_merged:
                all_highest, all_total, all_mean = merge_part(
                    all_highest, all_total, all_mean, highest, total, mean
                )
            else:
                place = (seq * (Hkv * G) + head) * num_states + tile_start // PART
                tl.store(sums_ptr + place * 2, highest, mask=rows < G)
                tl.store(sums_ptr + place * 2 + 1, total, mask=rows < G)
                tl.store(means_ptr + place[:, None] * D + channels[None, :], mean, mask=inside)
            highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if num_states == 0:
        result = (all_mean / all_total[:, None]).to(out_ptr.dtype.element_ty)
        out_offsets = token.to(tl.int64) * out_token + head[:, None] * out_head + channels[None, :]
        tl.store(out_ptr + out_offsets, result, mask=inside)
    elif is_merged:
        place = (seq * (Hkv * G) + head) * num_states + chunk
        tl.store(sums_ptr + place * 2, all_highest, mask=rows < G)
        tl.store(sums_ptr + place * 2 + 1, all_total, mask=rows < G)
        tl.store(means_ptr + place[:, None] * D + channels[None, :], all_mean, mask=inside)


def choose_parts(num_seqs: int, num_kv_heads: int, num_parts: int, processors: int) -> int:
    """Parts that a program takes, a power of two: for some three programs a processor.

    Only the time depends on it.
    """
    parts = num_seqs * num_kv_heads * num_parts // (3 * processors)
    return min(1 << max(parts, 1).bit_length() - 1, GROUP)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    part: int = PART,
    parts: int | None = None,
    tile: Tile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend as in the formula above; returns `out`, or a new contiguous tensor, [T, Hq, D].

    `part` is a multiple of the tile's keys. A program takes `parts` of them, 1, 2, 4, 8 or 16, and
    reads by `tile`; None: as the device wants. Rows of other chunks and of padding are not written.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    check_attention(q, k_cache, v_cache, cu_seqlens_q, context_lens, block_tables, scale, out)
    num_seqs = context_lens.shape[0]
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    tile = tile or choose_tile("decode_attention", q, k_cache)
    check_divisible("part", part, "the keys of a tile", tile.keys)
    if not num_seqs:
        return out
    group = num_heads // num_kv_heads
    num_parts = triton.cdiv(block_tables.shape[1] * block_size, part)
    reached = num_parts if window is None else min(num_parts, window // part + 2)
    if parts is None:
        parts = choose_parts(num_seqs, num_kv_heads, reached, num_processors(q.device))
    is_whole = parts >= num_parts  # the first group is all there is
    is_merged = is_whole or parts == GROUP
    state = part * GROUP if is_merged else part
    num_states = triton.cdiv(num_parts * part, state)
    shape = (0,) if is_whole else (num_seqs, num_heads, num_states)
    sums = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    means = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    programs = min(triton.cdiv(num_parts, parts), triton.cdiv(reached, parts) + 1)
    _decode_parts_kernel[(num_kv_heads, programs, num_seqs)](
        q,
        k_cache,
        v_cache,
        out,
        sums,
        means,
        cu_seqlens_q,
        context_lens,
        block_tables,
        scale / softcap if softcap else scale * LOG2_E,
        (softcap or 0.0) * LOG2_E,
        *q.stride()[:2],
        *out.stride()[:2],
        block_tables.stride(0),
        GROUP if is_whole else parts,
        0 if is_whole else num_states,
        int(is_merged),
        Hkv=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_D=block_d,
        BLOCK_M=max(tile.rows, triton.next_power_of_2(group)),
        PART=part,
        TILE=tile.keys,
        WINDOW=window or 0,
        CAPPED=bool(softcap),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
    if is_whole:
        return out
    merge_parts(
        sums,
        means,
        out,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        part=part,
        is_merged=is_merged,
        first_of=tile.keys,
        window=window or 0,
    )
    return out
