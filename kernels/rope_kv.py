"""Norm of the heads of q and k, rotary positions, and the write of k and v into the blocked cache.

    x = x / sqrt(mean(x ** 2) + eps) * weight        where there are norms: of each head x of q and
                                                     k, or of all heads of a token together
    a, b = x[:R/2], x[R/2:R]                         then, rounded to the dtype of q,
    x[:R/2], x[R/2:R] = a * cos - b * sin, b * cos + a * sin       with cos_sin[position]
    k_cache[slot // block_size, slot % block_size] = k, and v alike, where slot >= 0

| tensor           | shape                               | dtype                   | strides      |
| ---------------- | ----------------------------------- | ----------------------- | ------------ |
| q                | [T, Hq, D]                          | float32, bfloat16, half | rows, any, 1 |
| k, v             | [T, Hkv, D]                         | that of q               | rows, any, 1 |
| positions, slots | [T]                                 | int64                   | 1            |
| cos_sin          | [P, R], R even and <= D; 0: no turn | float32                 | contiguous   |
| k_cache, v_cache | [num_blocks, block_size, Hkv, D]    | these or float8_e4m3fn  | contiguous   |
| q_norm, k_norm   | [D]; or [Hq * D] and [Hkv * D]      | float32, bfloat16, half | 1            |

q changes in place. k stays as it is, since attention reads it from the cache. What float8_e4m3fn
cannot hold becomes the nearest that it can, 448 or -448.

A program has some heads of q of one token, or some of k and the same of v; they share cosines and
sines. Memory-bound: each element is moved once in and once out, 16 bytes at a time where heads and
their halves are multiples of that.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import (
    check_contiguous,
    check_device,
    check_divisible,
    check_dtype,
    check_floating,
    check_rows,
    check_shape,
)

#: Elements of one tile of heads, unless a token's heads are normed together: 16 for each thread.
_TILE = 2048


@triton.jit
def _squares(tile):
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def _normed(tile, scale, weight):
    return (tile.to(tl.float32) * scale[:, None] * weight.to(tl.float32)).to(tile.dtype)


@triton.jit
def _load_heads(
    row,  # of a token, [heads, D]
    head_stride,
    heads,  # [BLOCK_H]
    angles,  # of the token's position, [R]
    norm_ptr,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,  # "", "head" or "whole"
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Heads normed and turned: both halves of the channels that turn, and the rest of them."""
    half, rest = tl.arange(0, BLOCK_HALF), R + tl.arange(0, BLOCK_REST)
    turning = (heads < H)[:, None] & (half < R // 2)[None, :]
    others = (heads < H)[:, None] & (rest < D)[None, :]
    at = row + heads[:, None] * head_stride
    a = tl.load(at + half[None, :], mask=turning, other=0.0)
    b = tl.load(at + R // 2 + half[None, :], mask=turning, other=0.0)
    c = a
    if R < D:
        c = tl.load(at + rest[None, :], mask=others, other=0.0)
    cos, sin, weights = a, a, norm_ptr + tl.zeros_like(heads)[:, None]
    if R > 0:  # whatever is read is asked for before the sums are waited for
        cos = tl.load(angles + half, mask=half < R // 2, other=0.0)[None, :]
        sin = tl.load(angles + R // 2 + half, mask=half < R // 2, other=0.0)[None, :]
    if NORM != "":
        if NORM == "whole":
            weights += heads[:, None] * D
        weight_a = tl.load(weights + half[None, :], mask=turning, other=0.0)
        weight_b = tl.load(weights + R // 2 + half[None, :], mask=turning, other=0.0)
        squares = _squares(a) + _squares(b)
        if R < D:
            weight_c = tl.load(weights + rest[None, :], mask=others, other=0.0)
            squares += _squares(c)
        if NORM == "whole":
            squares = tl.sum(squares, axis=0) / H + tl.zeros_like(squares)
        scale = tl.rsqrt(squares / D + eps)
        a, b = _normed(a, scale, weight_a), _normed(b, scale, weight_b)
        if R < D:
            c = _normed(c, scale, weight_c)
    if R > 0:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = (wide_a * cos - wide_b * sin).to(a.dtype)
        b = (wide_b * cos + wide_a * sin).to(b.dtype)
    return a, b, c


@triton.jit
def _cached(tile, dtype: tl.constexpr):
    """What the cache keeps of it; conversions to float8_e4m3fn saturate, and a NaN stays one."""
    return tile.to(tl.float32).to(dtype)


@triton.jit
def _rope_store_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_token,  # strides in elements: of a token, and of a head
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    eps,
    Hq: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    Q_TILES: tl.constexpr = (Hq + BLOCK_Q - 1) // BLOCK_Q if R > 0 or NORM != "" else 0
    TILES: tl.constexpr = Q_TILES + (Hkv + BLOCK_KV - 1) // BLOCK_KV
    token = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    angles = cos_sin_ptr + tl.load(positions_ptr + token) * R
    half, rest = tl.arange(0, BLOCK_HALF)[None, :], R + tl.arange(0, BLOCK_REST)[None, :]
    if tile < Q_TILES:
        heads = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        row = q_ptr + token * q_token
        a, b, c = _load_heads(
            row, q_head, heads, angles, q_norm_ptr, eps, Hq, D, R, NORM, BLOCK_HALF, BLOCK_REST
        )
        at, inside = row + heads[:, None] * q_head, (heads < Hq)[:, None]
        tl.store(at + half, a, mask=inside & (half < R // 2))
        tl.store(at + R // 2 + half, b, mask=inside & (half < R // 2))
        if NORM != "" and R < D:
            tl.store(at + rest, c, mask=inside & (rest < D))
        return
    slot = tl.load(slots_ptr + token)
    heads = (tile - Q_TILES) * BLOCK_KV + tl.arange(0, BLOCK_KV)
    inside = (heads < Hkv)[:, None]
    channels = tl.arange(0, BLOCK_D)[None, :]
    v_at = v_ptr + token * v_token + heads[:, None] * v_head + channels
    v = tl.load(v_at, mask=inside & (channels < D), other=0.0)
    row = k_ptr + token * k_token
    a, b, c = _load_heads(
        row, k_head, heads, angles, k_norm_ptr, eps, Hkv, D, R, NORM, BLOCK_HALF, BLOCK_REST
    )
    inside = (heads < tl.where(slot < 0, 0, Hkv))[:, None]
    cached = (slot * Hkv + heads[:, None]) * D
    at = v_cache_ptr + cached + channels
    tl.store(at, _cached(v, v_cache_ptr.dtype.element_ty), mask=inside & (channels < D))
    at = k_cache_ptr + cached
    dtype = k_cache_ptr.dtype.element_ty
    tl.store(at + half, _cached(a, dtype), mask=inside & (half < R // 2))
    tl.store(at + R // 2 + half, _cached(b, dtype), mask=inside & (half < R // 2))
    if R < D:
        tl.store(at + rest, _cached(c, dtype), mask=inside & (rest < D))


def rope_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Norm and turn `q` in place, store `k` normed and turned, and `v`; returns `q`.

    Shapes are in the table above. Either both norms are given or none.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    check_shape("q", q, "T", "Hq", "D")
    num_tokens, num_heads, head_dim = q.shape
    check_shape("k", k, num_tokens, "Hkv", head_dim)
    num_kv_heads, rotary_dim = k.shape[1], cos_sin.shape[-1]
    _check(q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache)
    norm = _check_norms(q, k, q_norm, k_norm)
    if not num_tokens:
        return q
    block_d = triton.next_power_of_2(head_dim)
    block_q, block_kv = triton.next_power_of_2(num_heads), triton.next_power_of_2(num_kv_heads)
    if norm != "whole":
        most = max(_TILE // block_d, 1)
        block_q, block_kv = min(block_q, most), min(block_kv, most)
    q_tiles = triton.cdiv(num_heads, block_q) if rotary_dim or norm else 0
    tiles = q_tiles + triton.cdiv(num_kv_heads, block_kv)
    _rope_store_kv_kernel[(num_tokens * tiles,)](
        q,
        k,
        v,
        positions,
        cos_sin,
        slot_mapping,
        k_cache,
        v_cache,
        q if q_norm is None else q_norm,
        k if k_norm is None else k_norm,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        eps,
        Hq=num_heads,
        Hkv=num_kv_heads,
        D=head_dim,
        R=rotary_dim,
        NORM=norm,
        BLOCK_Q=block_q,
        BLOCK_KV=block_kv,
        BLOCK_HALF=triton.next_power_of_2(max(rotary_dim // 2, 1)),
        BLOCK_REST=triton.next_power_of_2(max(head_dim - rotary_dim, 1)),
        BLOCK_D=block_d,
        num_warps=min(max(block_q * block_d // 512, 1), 8 if norm == "whole" else 4),
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
    return q


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    num_tokens, _, head_dim = q.shape
    check_shape("v", v, *k.shape)
    check_shape("positions", positions, num_tokens)
    check_shape("slot_mapping", slot_mapping, num_tokens)
    check_shape("cos_sin", cos_sin, "P", "R")
    check_shape("k_cache", k_cache, "num_blocks", "block_size", k.shape[1], head_dim)
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_floating("q", q)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_dtype("positions", positions, torch.int64)
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    check_dtype("cos_sin", cos_sin, torch.float32)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != torch.float8_e4m3fn:
            check_floating(name, cache)
    check_rows(q=q, k=k, v=v)
    check_contiguous(
        positions=positions,
        cos_sin=cos_sin,
        slot_mapping=slot_mapping,
        k_cache=k_cache,
        v_cache=v_cache,
    )
    check_device(
        q.device,
        k=k,
        v=v,
        positions=positions,
        cos_sin=cos_sin,
        slot_mapping=slot_mapping,
        k_cache=k_cache,
        v_cache=v_cache,
    )
    rotary_dim = cos_sin.shape[1]
    check_divisible("the width of cos_sin", rotary_dim, "cosines and sines", 2)
    if rotary_dim > head_dim:
        raise ValueError(f"cos_sin: expected a width of 0 to D = {head_dim}, got {rotary_dim}")


def _check_norms(
    q: torch.Tensor, k: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None
) -> str:
    """What is normed: "head", "whole" or nothing."""
    if q_norm is None or k_norm is None:
        if q_norm is not k_norm:
            raise ValueError("q_norm, k_norm: expected both or none, got one")
        return ""
    norm = "head" if q_norm.shape == q.shape[2:] else "whole"
    for name, weight, heads in (("q_norm", q_norm, q), ("k_norm", k_norm, k)):
        check_shape(name, weight, (1 if norm == "head" else heads.shape[1]) * heads.shape[2])
        check_floating(name, weight)
        check_rows(**{name: weight})
        check_device(q.device, **{name: weight})
    return norm
