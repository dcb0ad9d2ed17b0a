"""Rotary positions for q and k, and the write of k and v into the blocked cache, in one kernel.

    a, b = x[:R/2], x[R/2:R]                       for every head x of q and k
    x[:R/2], x[R/2:R] = a * cos - b * sin, b * cos + a * sin      with cos_sin[position]
    k_cache[slot // block_size, slot % block_size] = k, and v alike, where slot >= 0

| tensor           | shape                              | dtype                   | strides      |
| ---------------- | ---------------------------------- | ----------------------- | ------------ |
| q                | [T, Hq, D]                         | float32, bfloat16, half | rows, any, 1 |
| k, v             | [T, Hkv, D]                        | that of q               | rows, any, 1 |
| positions, slots | [T]                                | int64                   | 1            |
| cos_sin          | [P, R], R even and <= D            | float32                 | contiguous   |
| k_cache, v_cache | [num_blocks, block_size, Hkv, D]   | any floating            | contiguous   |

One program per token and head; heads are numbered through q, then k, then v.
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
    q_token,  # strides in elements: of a token, and of a head
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    Hq: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    channels = tl.arange(0, BLOCK_D)
    if head < Hq + Hkv:
        half = tl.arange(0, BLOCK_HALF)
        rotated = half < R // 2
        row = q_ptr + token * q_token + head * q_head
        if head >= Hq:
            row = k_ptr + token * k_token + (head - Hq) * k_head
        angles = cos_sin_ptr + tl.load(positions_ptr + token) * R + half
        cos = tl.load(angles, mask=rotated, other=0.0)
        sin = tl.load(angles + R // 2, mask=rotated, other=0.0)
        a = tl.load(row + half, mask=rotated, other=0.0).to(tl.float32)
        b = tl.load(row + R // 2 + half, mask=rotated, other=0.0).to(tl.float32)
        first = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
        second = (b * cos + a * sin).to(q_ptr.dtype.element_ty)
        tl.store(row + half, first, mask=rotated)
        tl.store(row + R // 2 + half, second, mask=rotated)
        if (head >= Hq) & (slot >= 0):
            cached = k_cache_ptr + (slot * Hkv + (head - Hq)) * D
            dtype = k_cache_ptr.dtype.element_ty
            tl.store(cached + half, first.to(dtype), mask=rotated)
            tl.store(cached + R // 2 + half, second.to(dtype), mask=rotated)
            if R < D:
                plain = (channels >= R) & (channels < D)
                rest = tl.load(row + channels, mask=plain, other=0.0)
                tl.store(cached + channels, rest.to(dtype), mask=plain)
    elif slot >= 0:
        inside = channels < D
        v_row = v_ptr + token * v_token + (head - Hq - Hkv) * v_head
        values = tl.load(v_row + channels, mask=inside, other=0.0)
        v_cached = v_cache_ptr + (slot * Hkv + (head - Hq - Hkv)) * D
        tl.store(v_cached + channels, values.to(v_cache_ptr.dtype.element_ty), mask=inside)


def rope_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """Rotate `q` and `k` in place and store `k` and `v`; shapes as in the table above.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("q", q, "T", "Hq", "D")
    num_tokens, num_heads, head_dim = q.shape
    check_shape("k", k, num_tokens, "Hkv", head_dim)
    num_kv_heads = k.shape[1]
    check_shape("v", v, *k.shape)
    check_shape("positions", positions, num_tokens)
    check_shape("slot_mapping", slot_mapping, num_tokens)
    check_shape("cos_sin", cos_sin, "P", "R")
    check_shape("k_cache", k_cache, "num_blocks", "block_size", num_kv_heads, head_dim)
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_floating("q", q)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)
    check_dtype("positions", positions, torch.int64)
    check_dtype("slot_mapping", slot_mapping, torch.int64)
    check_dtype("cos_sin", cos_sin, torch.float32)
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
    if not 0 < rotary_dim <= head_dim:
        raise ValueError(f"cos_sin: expected a width of 2 to D = {head_dim}, got {rotary_dim}")
    if not num_tokens:
        return
    _rope_store_kv_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
        q,
        k,
        v,
        positions,
        cos_sin,
        slot_mapping,
        k_cache,
        v_cache,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        Hq=num_heads,
        Hkv=num_kv_heads,
        D=head_dim,
        R=rotary_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
        num_warps=1,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
