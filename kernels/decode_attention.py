"""Attention of the chunks of one query, those of sequences that decode, in Triton.

    out[i] = softmax(scale * q[i] . K[0 .. n - 1]) V[0 .. n - 1],
    i = cu_seqlens_q[s],  n = context_lens[s],  for every chunk s of length 1

with the window and the soft cap of `paged_attention.py`, whose table of arguments holds here. Other
chunks are left to that kernel: which is which is seen on the device, so that both can be in one
CUDA graph for any mixture.

Two kernels. The first takes the keys in parts of PART positions, counted from position 0:

    keys       0 ........ 255 | 256 ...... 511 | 512 ... n - 1
    programs   part 0           part 1           part 2           (sequence, KV head) each

so that one long sequence keeps the whole device busy. The G query heads that share a KV head are
the rows of its tile. Of each part it leaves the three values of a running softmax
(`attention_tile.py`); the second kernel merges them, in the order of the parts. Where the parts
begin depends on positions alone, so a row has the same bits alone, in any batch, and at any width
of the block tables.

The grid is bound by what the block tables can hold, known on the host; programs of parts that a
sequence does not have leave at once. No length is read back, so the launch can be in a CUDA graph.

Memory-bound: 2 * Hkv * D * n elements of the cache are read once.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.attention_tile import LOG2_E, visit_keys
from tokenmill.kernels.checks import check_divisible
from tokenmill.kernels.paged_attention import check_attention

#: Positions of a part. Results depend on it in their last bits: one number for all batches.
PART = 256


@triton.jit(do_not_specialize=["table_row", "num_parts"])
def _decode_parts_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    sums_ptr,  # [S, Hq, num_parts, 2] float32: highest and total
    means_ptr,  # [S, Hq, num_parts, D] float32
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    score_scale,  # of `visit_keys`
    cap_log2,
    q_token,  # strides in elements
    q_head,
    table_row,
    num_parts,
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
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    context = tl.load(context_lens_ptr + seq)
    begin = part * PART
    if WINDOW:
        begin = tl.maximum(begin, (context - WINDOW) // TILE * TILE)
    end = tl.minimum(context, part * PART + PART)
    token = tl.load(cu_seqlens_q_ptr + seq)
    if (tl.load(cu_seqlens_q_ptr + seq + 1) - token != 1) | (begin >= end):
        return

    rows = tl.arange(0, BLOCK_M)
    head = kv_head * G + rows
    channels = tl.arange(0, BLOCK_D)
    inside = (rows < G)[:, None] & (channels < D)[None, :]
    q_offsets = token.to(tl.int64) * q_token + head[:, None] * q_head + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    query_position = tl.full([BLOCK_M], 0, tl.int32) + context - 1
    table = block_tables_ptr + seq * table_row
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile_start in range(begin, end, TILE):
        highest, total, mean = visit_keys(
            q,
            highest,
            total,
            mean,
            query_position,
            tile_start,
            end,
            table,
            k_cache_ptr,
            v_cache_ptr,
            kv_head,
            score_scale,
            cap_log2,
            Hkv,
            D,
            BLOCK_SIZE,
            BLOCK_D,
            TILE,
            WINDOW,
            CAPPED,
            PRECISION,
        )
    place = (seq * (Hkv * G) + head) * num_parts + part
    tl.store(sums_ptr + place * 2, highest, mask=rows < G)
    tl.store(sums_ptr + place * 2 + 1, total, mask=rows < G)
    tl.store(means_ptr + place[:, None] * D + channels[None, :], mean, mask=inside)


@triton.jit(do_not_specialize=["num_parts"])
def _merge_parts_kernel(
    sums_ptr,
    means_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    out_token,
    out_head,
    num_parts,
    Hq: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    token = tl.load(cu_seqlens_q_ptr + seq)
    if tl.load(cu_seqlens_q_ptr + seq + 1) - token != 1:
        return
    context = tl.load(context_lens_ptr + seq)
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    first = 0
    if WINDOW:
        first = tl.maximum((context - WINDOW) // TILE * TILE, 0) // PART
    highest = -1e30
    total = 0.0
    mean = tl.zeros([BLOCK_D], tl.float32)
    for part in range(first, tl.cdiv(context, PART)):
        place = (seq * Hq + head) * num_parts + part
        score = tl.load(sums_ptr + place * 2)
        risen = tl.maximum(highest, score)
        shrink = tl.exp2(highest - risen)
        weight = tl.exp2(score - risen)
        total = total * shrink + tl.load(sums_ptr + place * 2 + 1) * weight
        part_mean = tl.load(means_ptr + place * D + channels, mask=inside, other=0.0)
        mean = mean * shrink + part_mean * weight
        highest = risen
    mean = mean / total
    out = out_ptr + token.to(tl.int64) * out_token + head * out_head + channels
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=inside)


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend as in the formula above; returns `out`, or a new contiguous tensor, [T, Hq, D].

    `part` is a multiple of 64. Rows of other chunks and of padding are not written.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    check_attention(q, k_cache, v_cache, cu_seqlens_q, context_lens, block_tables, out)
    check_divisible("part", part, "a tile", 64)
    num_seqs = context_lens.shape[0]
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    if not num_seqs:
        return out
    num_parts = triton.cdiv(block_tables.shape[1] * block_size, part)
    shape = (num_seqs, num_heads, num_parts)
    sums = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    means = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = 32 if q.dtype == torch.float32 or head_dim > 128 else 64
    _decode_parts_kernel[(num_parts, num_kv_heads, num_seqs)](
        q,
        k_cache,
        v_cache,
        sums,
        means,
        cu_seqlens_q,
        context_lens,
        block_tables,
        scale / softcap if softcap else scale * LOG2_E,
        (softcap or 0.0) * LOG2_E,
        *q.stride()[:2],
        block_tables.stride(0),
        num_parts,
        Hkv=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_D=block_d,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        PART=part,
        TILE=tile,
        WINDOW=window or 0,
        CAPPED=bool(softcap),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
        # The load of the block number takes stages too: from 5 on keys and values are read ahead.
        num_stages=3 if q.dtype == torch.float32 else 5,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
    _merge_parts_kernel[(num_heads, num_seqs)](
        sums,
        means,
        out,
        cu_seqlens_q,
        context_lens,
        *out.stride()[:2],
        num_parts,
        Hq=num_heads,
        D=head_dim,
        BLOCK_D=block_d,
        PART=part,
        TILE=tile,
        WINDOW=window or 0,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return out
