"""One tile of keys of an attention, in Triton: what chunks and decoding sequences share.

A softmax over keys that come tile by tile is kept as three running values of each query row:
`highest` score h, `total` = sum exp2(s - h), and `mean` = sum exp2(s - h) v, not yet divided.
Scores are in powers of two: log2(e) is in `score_scale`, or in `cap_log2` where they are capped.

Most tiles are seen whole by all rows. Only those at an edge are masked, under a branch that all
threads take together: the masks select among the same numbers, so a row has the same bits either
way. Keys from `end` on are not there: in their places the last one is read again, so that what
happens to lie in the rest of its block (NaN is allowed) never meets a weight.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def block_at(table, position, end, BLOCK_SIZE: tl.constexpr):
    """The block of `position`; behind `end` that of the last key."""
    return tl.load(table + tl.minimum(position, end - 1) // BLOCK_SIZE)


@triton.jit
def read_tile(
    cache_ptr,
    table,  # of blocks, of the one sequence
    block,  # that of `tile_start`; not looked at where a tile does not lie in one block
    tile_start,  # below `end`
    end,
    kv_head,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    REPEAT: tl.constexpr,  # read the last key again behind the end
):
    """Keys, or values, from `tile_start` on, [TILE, BLOCK_D]; zeros in the channels behind D."""
    channels = tl.arange(0, BLOCK_D)
    key = tl.arange(0, TILE)
    if REPEAT or BLOCK_SIZE % TILE != 0:
        key = tl.minimum(key, end - 1 - tile_start)
    if BLOCK_SIZE % TILE == 0:  # rows at one distance: 32 bits of offset, and no lookup a key
        first = block.to(tl.int64) * BLOCK_SIZE + tile_start % BLOCK_SIZE
        rows = cache_ptr + (first * Hkv + kv_head) * D + (key.to(tl.int64) * (Hkv * D))[:, None]
    else:
        position = tile_start + key
        number = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        cached = number * BLOCK_SIZE + position % BLOCK_SIZE
        rows = cache_ptr + ((cached * Hkv + kv_head) * D)[:, None]
    if D == BLOCK_D:
        return tl.load(rows + channels[None, :])
    return tl.load(rows + channels[None, :], mask=(channels < D)[None, :], other=0.0)


@triton.jit
def mask_scores(
    scores,  # [BLOCK_M, TILE]
    query_position,  # [BLOCK_M], below `end`
    tile_start,
    WINDOW: tl.constexpr,  # 0: none
    TILE: tl.constexpr,
):
    """-inf where a row does not see a key."""
    position = tile_start + tl.arange(0, TILE)
    visible = position[None, :] <= query_position[:, None]
    if WINDOW:
        visible = visible & (position[None, :] > query_position[:, None] - WINDOW)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def cap_scores(scores, score_scale, cap_log2):
    """Scores in powers of two after the soft cap."""
    return cap_log2 * (2.0 * tl.sigmoid(2.0 * score_scale * scores) - 1.0)  # cap * tanh


@triton.jit
def add_scores(
    scores,  # [BLOCK_M, TILE]
    highest,  # [BLOCK_M] float32
    total,  # [BLOCK_M] float32
    score_scale,  # above 0; 1 if they are in powers of two already
    WINDOW: tl.constexpr,
):
    """Weights [BLOCK_M, TILE] of a tile, what `mean` shrinks by, and the new highest and total.

    Multiply-adds are spelt out, for the same bits in all kernels.
    """
    risen = tl.maximum(highest, tl.max(scores, axis=1) * score_scale)
    if WINDOW:  # a row may see nothing of this tile; without a window each has seen position 0,
        risen = tl.maximum(risen, -1e30)  # or the first key of its part
    weights = tl.exp2(tl.fma(scores, score_scale, -risen[:, None]))
    shrink = tl.exp2(highest - risen)
    return weights, shrink, risen, tl.fma(total, shrink, tl.sum(weights, axis=1))
