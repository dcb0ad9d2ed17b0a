"""Causal attention of ragged chunks over the blocked KV cache, in Triton.

    out[i] = softmax(scale * q[i] . K[0 .. p(i)]) V[0 .. p(i)],   p(i) = context - n + i

for query i of a chunk of n tokens whose sequence has `context` cached tokens, the chunk included;
with a window w, of the keys p(i) - w + 1 to p(i) alone, and with a soft cap c, of the scores
c * tanh(scale * q[i] . K / c).
K and V are read through the sequence's block table. Query head h reads KV head h // G, with
G = Hq / Hkv.

| tensor           | shape                            | dtype                   | strides      |
| ---------------- | -------------------------------- | ----------------------- | ------------ |
| q                | [T, Hq, D]                       | float32, bfloat16, half | rows, any, 1 |
| k_cache, v_cache | [num_blocks, block_size, Hkv, D] | any floating            | contiguous   |
| cu_seqlens_q     | [S + 1]                          | int32                   | 1            |
| context_lens     | [S]                              | int32                   | 1            |
| block_tables     | [S, B]                           | int32                   | rows, 1      |
| out              | [T, Hq, D]                       | that of q               | rows, any, 1 |

A tile of BLOCK_M rows holds BLOCK_Q queries times the G heads that share a KV head, so that
decoding fills the tensor cores too. No two chunks share a tile: chunk s has its tiles from number
`cu_seqlens_q[s] // BLOCK_Q + s` on, a numbering with gaps that needs no other prefix sum. The grid
is the bound `T // BLOCK_Q + S`, known without reading lengths back; each program finds its chunk by
counting those before it, SEARCHED at a time, and leaves if it stands in a gap.

Keys are visited from position 0 in tiles of TILE, in one program: a row's result depends neither on
the other chunks of the step nor on where its own chunk started. With a window the first tile is the
one that the tile's first row begins to see; a later row skips it with weights of zero. The scores
of a tile are asked for before those of the one before it are weighed, so that the tensor cores work
meanwhile. Programs run from the last tile of rows to the first: long ones first.

A row's bits depend on the form of its tile (`tiles.py`), of which there is one for all steps: a
sequence's rows are the same alone or among others, whole, in chunks that end anywhere, or decoded
by this kernel.
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
from tokenmill.kernels.checks import (
    check_contiguous,
    check_device,
    check_divisible,
    check_dtype,
    check_floating,
    check_rows,
    check_shape,
)
from tokenmill.kernels.tiles import Tile, choose_tile

#: Chunks that a program looks at together to find its own.
SEARCHED = 256


# The counts change from step to step: specialised, each new kind would compile while serving.
@triton.jit(do_not_specialize=["num_seqs", "table_row"])
def _paged_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    block_tables_ptr,
    num_seqs,
    score_scale,  # scale * log2(e); CAPPED: scale / cap
    cap_log2,  # cap * log2(e)
    q_token,  # strides in elements
    q_head,
    out_token,
    out_head,
    table_row,
    Hkv: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    q_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see most keys come first
    kv_head = tl.program_id(1)
    seq = -1
    for first in range(0, num_seqs, SEARCHED):  # the last chunk whose first tile is not behind
        chunks = first + tl.arange(0, SEARCHED)
        starts = tl.load(cu_seqlens_q_ptr + chunks, mask=chunks < num_seqs, other=0)
        is_before = (chunks < num_seqs) & (starts // BLOCK_Q + chunks <= q_tile)
        seq += tl.sum(is_before.to(tl.int32), axis=0)
    start = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - start
    first_query = (q_tile - start // BLOCK_Q - seq) * BLOCK_Q
    if (first_query >= query_len) | (SKIP_SINGLE & (query_len == 1)):
        return

    rows = tl.arange(0, BLOCK_M)
    query = first_query + rows // G
    head = kv_head * G + rows % G
    row_inside = (rows < BLOCK_Q * G) & (query < query_len)
    channels = tl.arange(0, BLOCK_D)
    channel_inside = channels < D
    token = (start + query).to(tl.int64)
    q_inside = row_inside[:, None] & channel_inside[None, :]
    q_offsets = token[:, None] * q_token + head[:, None] * q_head + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    if k_cache_ptr.dtype.element_ty.primitive_bitwidth == 8 and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)  # holds fp8 as well, and one instruction makes two of them

    before = tl.load(context_lens_ptr + seq) - query_len  # tokens cached before this chunk
    end = before + tl.minimum(first_query + BLOCK_Q, query_len)  # keys that any row sees
    query_position = tl.minimum(before + query, end - 1)  # padding rows see what the last row sees
    table = block_tables_ptr + tl.cast(seq, tl.int64) * table_row
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = 0
    if WINDOW:
        begin = tl.maximum(before + first_query - WINDOW + 1, 0) // TILE * TILE
    last = (end - 1) // TILE * TILE
    block = block_at(table, begin, end, BLOCK_SIZE)
    next_block = block_at(table, begin + TILE, end, BLOCK_SIZE)
    k = read_tile(
        k_cache_ptr, table, block, begin, end, kv_head,
        Hkv, D, BLOCK_SIZE, BLOCK_D, TILE, False,
    )  # fmt: skip
    next_scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    for tile_start in range(begin, end, TILE):
        # The next tile's scores come first, for the tensor cores to work while these are weighed.
        following = tl.minimum(tile_start + TILE, last)
        k = read_tile(
            k_cache_ptr, table, next_block, following, end, kv_head,
            Hkv, D, BLOCK_SIZE, BLOCK_D, TILE, False,
        )  # fmt: skip
        v = read_tile(
            v_cache_ptr, table, block, tile_start, end, kv_head,
            Hkv, D, BLOCK_SIZE, BLOCK_D, TILE, True,
        )  # fmt: skip
        block = block_at(table, tile_start + TILE, end, BLOCK_SIZE)
        next_block = block_at(table, tile_start + 2 * TILE, end, BLOCK_SIZE)
        scores = next_scores
        next_scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        scale = score_scale
        if CAPPED:
            scores = cap_scores(scores, score_scale, cap_log2)
            scale = 1.0
        at_edge = tile_start + TILE > before + first_query + 1
        if WINDOW:
            at_edge = at_edge | (tile_start < end - WINDOW)
        if at_edge:
            scores = mask_scores(scores, query_position, tile_start, WINDOW, TILE)
        weights, shrink, highest, total = add_scores(scores, highest, total, scale, WINDOW)
        mean = mean * shrink[:, None]
        mean = tl.dot(weights.to(q.dtype), v.to(q.dtype), mean, input_precision=PRECISION)

    # Read again, for the rows' places not to be kept in registers over the loop.
    token = tl.load(cu_seqlens_q_ptr + seq, volatile=True).to(tl.int64) + query
    out_offsets = token[:, None] * out_token + head[:, None] * out_head + channels[None, :]
    mean = (mean / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offsets, mean, mask=q_inside)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    skip_single: bool = False,
    tile: Tile | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend as in the formula above; returns `out`, or a new contiguous tensor, [T, Hq, D].

    Rows behind the last chunk are padding and are not written, nor, with `skip_single`, are those
    of chunks of one query, which `decode_attention.py` is for. `max_query_len` is not looked at;
    `tile` None: that of the device.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    del max_query_len
    check_attention(q, k_cache, v_cache, cu_seqlens_q, context_lens, block_tables, scale, out)
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = context_lens.shape[0]
    block_size, num_kv_heads = k_cache.shape[1:3]
    if not num_tokens or not num_seqs:
        return out
    group = num_heads // num_kv_heads
    tile = tile or choose_tile("chunk_attention", q, k_cache)
    block_m = max(triton.next_power_of_2(group), tile.rows)
    block_q = block_m // group
    _paged_attention_kernel[(num_tokens // block_q + num_seqs, num_kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        cu_seqlens_q,
        context_lens,
        block_tables,
        num_seqs,
        scale / softcap if softcap else scale * LOG2_E,
        (softcap or 0.0) * LOG2_E,
        *q.stride()[:2],
        *out.stride()[:2],
        block_tables.stride(0),
        Hkv=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        TILE=tile.keys,
        WINDOW=window or 0,
        CAPPED=bool(softcap),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SKIP_SINGLE=skip_single,
        SEARCHED=SEARCHED,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
    return out


def check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Compare the arguments with the table above.

    Raises:
        ValueError: one does not fit it.
    """
    check_shape("q", q, "T", "Hq", "D")
    check_shape("k_cache", k_cache, "num_blocks", "block_size", "Hkv", q.shape[2])
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_shape("context_lens", context_lens, "S")
    check_shape("cu_seqlens_q", cu_seqlens_q, context_lens.shape[0] + 1)
    check_shape("block_tables", block_tables, context_lens.shape[0], "B")
    check_shape("out", out, *q.shape)
    check_divisible("the heads of q", q.shape[1], "Hkv", k_cache.shape[2])
    check_floating("q", q)
    check_dtype("v_cache", v_cache, k_cache.dtype)
    check_dtype("out", out, q.dtype)
    if not scale > 0:  # the highest score is looked for before it is scaled
        raise ValueError(f"scale: expected above 0, got {scale}")
    lengths = {"cu_seqlens_q": cu_seqlens_q, "context_lens": context_lens}
    for name, tensor in (*lengths.items(), ("block_tables", block_tables)):
        check_dtype(name, tensor, torch.int32)
    check_rows(q=q, out=out, block_tables=block_tables)
    check_contiguous(k_cache=k_cache, v_cache=v_cache, **lengths)
    check_device(
        q.device, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables, out=out, **lengths
    )
