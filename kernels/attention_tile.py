"""One tile of keys of an attention, in Triton: what chunks and decoding sequences share.

A softmax over keys that come tile by tile is kept as three running values of each query row:
`highest` score h, `total` = sum exp2(s - h), and `mean` = sum exp2(s - h) v, not yet divided.
Scores are in powers of two: log2(e) is in `score_scale`, or in `cap_log2` where they are capped.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def visit_keys(
    q,  # [BLOCK_M, BLOCK_D]
    highest,  # [BLOCK_M] float32
    total,  # [BLOCK_M] float32
    mean,  # [BLOCK_M, BLOCK_D] float32
    query_position,  # [BLOCK_M]
    tile_start,
    end,  # keys from here on are not there
    table,  # of blocks, of the one sequence
    k_cache_ptr,
    v_cache_ptr,
    kv_head,
    score_scale,  # scale * log2(e); CAPPED: scale / cap
    cap_log2,  # cap * log2(e)
    Hkv: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys from `tile_start` on to the running softmax; returns its three values."""
    channels = tl.arange(0, BLOCK_D)
    position = tile_start + tl.arange(0, TILE)
    key_inside = position < end
    block = tl.load(table + position // BLOCK_SIZE, mask=key_inside, other=0).to(tl.int64)
    cached = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * Hkv + kv_head) * D
    kv_offsets = cached[:, None] + channels[None, :]
    kv_inside = key_inside[:, None] & (channels < D)[None, :]
    k = tl.load(k_cache_ptr + kv_offsets, mask=kv_inside, other=0.0).to(q.dtype)
    v = tl.load(v_cache_ptr + kv_offsets, mask=kv_inside, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
    if CAPPED:
        scores = cap_log2 * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)  # cap * tanh
    visible = position[None, :] <= query_position[:, None]
    if WINDOW:
        visible = visible & (position[None, :] > query_position[:, None] - WINDOW)
    scores = tl.where(visible & key_inside[None, :], scores, float("-inf"))
    risen = tl.maximum(highest, tl.max(scores, axis=1))
    if WINDOW:  # a row may see nothing of this tile; without a window each has seen position 0,
        risen = tl.maximum(risen, -1e30)  # or the first key of its part
    weights = tl.exp2(scores - risen[:, None])
    shrink = tl.exp2(highest - risen)
    total = total * shrink + tl.sum(weights, axis=1)
    mean = mean * shrink[:, None]
    mean += tl.dot(weights.to(q.dtype), v, input_precision=PRECISION)
    return risen, total, mean
