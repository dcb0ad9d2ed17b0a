"""Every kernel in plain torch: the specification that the fast forms are tested against.

Written to be read: loops over sequences, float32 inside, no tricks. Slow, and right on any device.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from tokenmill.kernels.packed_codes import unpack_codes

#: The activations of the supported models; `gelu_tanh` is the tanh approximation. Spelt out: torch
#: computes the last few elements of its own forms by another exp than the others, so that a row's
#: bits would depend on the rows before it.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / torch.exp(-x).add_(1),
    "gelu": lambda x: torch.erf(x * 0.5**0.5).add_(1).mul_(x * 0.5),
    "gelu_tanh": lambda x: (
        torch.tanh((x * x * x).mul_(0.044715).add_(x).mul_((2 / torch.pi) ** 0.5))
        .add_(1)
        .mul_(x * 0.5)
    ),
    "relu": functional.relu,
}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row of `x` [T, H] to unit root mean square, times `weight` [H]; returns [T, H]."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    post: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x`, normed by `post` if that is given, to `residual` (both [T, H]) and norm the sum.

    Returns the normed rows [T, H] and the sum [T, H]; without a weight the sum twice. The sum is
    rounded to the dtype of `residual` before it is normed, so that both results describe the same
    numbers.
    """
    added = x if post is None else rms_norm(x, post, eps)
    total = (added.float() + residual.float()).to(residual.dtype)
    return total if weight is None else rms_norm(total, weight, eps), total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Shift and scale each row of `x` [T, H] to mean 0 and variance 1, then `* weight + bias`."""
    offset = None if bias is None else bias.float()
    normed = functional.layer_norm(x.float(), x.shape[-1:], weight.float(), offset, eps)
    return normed.to(x.dtype)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm`, with `layer_norm`."""
    total = (x.float() + residual.float()).to(residual.dtype)
    return layer_norm(total, weight, bias, eps), total


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """Return `kind(gate) * up` [T, I] for `gate_up` [T, 2I], the gate in the first half."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (ACTIVATIONS[kind](gate) * up).to(gate_up.dtype)


def rope_store_kv(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    positions: torch.Tensor,  # [T] int64
    cos_sin: torch.Tensor,  # [P, R] float32: R/2 cosines, then R/2 sines; R <= D
    slot_mapping: torch.Tensor,  # [T] int64: block * block_size + offset, or < 0
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    *,
    q_norm: torch.Tensor | None = None,  # [D] of each head, or [Hq * D] of all of them
    k_norm: torch.Tensor | None = None,  # [D] or [Hkv * D]
    eps: float = 0.0,
) -> torch.Tensor:
    """Norm `q` and `k` in place, turn them by their positions, write `k` and `v` to their slots.

    Half-split (NeoX) rotation of the first R channels of each head. Rows with a slot below zero
    are padding: turned, not stored. Returns `q`.
    """
    for heads, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            heads.copy_(norm_heads(heads, weight, eps))
    if cos_sin.shape[1]:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, R/2] each
        _turn(q, cos, sin)
        _turn(k, cos, sin)
    stored = slot_mapping >= 0
    block, offset = _split(slot_mapping[stored], k_cache.shape[1])
    k_cache[block, offset] = _cached(k[stored], k_cache.dtype)
    v_cache[block, offset] = _cached(v[stored], v_cache.dtype)
    return q


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    half = cos.shape[-1]
    first, second = heads[..., :half].float(), heads[..., half : 2 * half].float()
    # Both halves before either is written: `first` and `second` may be views of `heads`.
    turned = first * cos - second * sin, second * cos + first * sin
    heads[..., :half] = turned[0].to(heads.dtype)
    heads[..., half : 2 * half] = turned[1].to(heads.dtype)


def norm_heads(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of heads [T, heads, D] in rows as wide as `weight`: of one head, or of all."""
    return rms_norm(heads.reshape(-1, weight.shape[0]), weight, eps).view(heads.shape)


def _cached(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to `dtype`; torch makes NaN of what float8_e4m3fn is too small for."""
    if dtype == torch.float8_e4m3fn:
        rows = rows.float().clamp(-448.0, 448.0)
    return rows.to(dtype)


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    *,
    cu_seqlens_q: torch.Tensor,  # [S + 1] int32: prefix sums of the chunk lengths
    context_lens: torch.Tensor,  # [S] int32: cached tokens, the chunk included
    block_tables: torch.Tensor,  # [S, B] int32
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,  # [T, Hq, D]
) -> torch.Tensor:
    """Causal attention of ragged chunks over the blocked KV cache; returns [T, Hq, D].

    Query i of a chunk of n tokens sits at position `context_len - n + i` and sees the positions
    up to its own, with a `window` the last that many, its own included. A `softcap` bends each
    scaled score s to `softcap * tanh(s / softcap)`. Query head h reads KV head `h * Hkv // Hq`.
    Rows behind the last chunk, if any, are padding and stay as they are. `max_query_len` is a hint
    for kernels and is not used here.
    """
    del max_query_len
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    group = q.shape[1] // k_cache.shape[2]
    starts = cu_seqlens_q.tolist()
    for number, context_len in enumerate(context_lens.tolist()):
        rows = slice(starts[number], starts[number + 1])
        positions = torch.arange(context_len, device=q.device)
        block, offset = _split(positions, k_cache.shape[1])
        block = block_tables[number].long()[block]
        keys = k_cache[block, offset].float().repeat_interleave(group, dim=1)  # [N, Hq, D]
        values = v_cache[block, offset].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,nhd->hqn", q[rows].float(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_positions = positions[context_len - scores.shape[1] :]
        hidden = positions[None, :] > query_positions[:, None]  # [n, N]
        if window is not None:
            hidden |= positions[None, :] <= query_positions[:, None] - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[rows] = torch.einsum("hqn,nhd->qhd", weights, values).to(out.dtype)
    return out


def route(
    router_logits: torch.Tensor, top_k: int, *, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` likeliest experts of each row of `router_logits` [T, E].

    Returns their shares [T, top_k] float32, which sum to 1 if `normalize`, and their numbers
    [T, top_k] int32.
    """
    shares, chosen = router_logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if normalize:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares, chosen.to(torch.int32)


def grouped_linear(
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # [E, N, K]
    chosen: torch.Tensor,  # [T, top_k]
) -> torch.Tensor:
    """Row `t * top_k + rank` of the result [T * top_k, N] is `x[t]` times that expert's weight."""
    rows = x.float().repeat_interleave(chosen.shape[1], dim=0)
    pairs = zip(rows, chosen.flatten().tolist(), strict=True)
    return torch.stack([weight[expert].float() @ row for row, expert in pairs]).to(x.dtype)


def dequant_linear(
    x: torch.Tensor,  # [M, K]
    words: torch.Tensor,  # [B, N, W] int32, as `packed_codes.py` says
    scales: torch.Tensor,  # [G, N]
    zeros: torch.Tensor,  # [G, N]
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,  # 0: one group
) -> torch.Tensor:
    """Multiply `x` by the weights that the words stand for, rounded to its dtype; [M, N]."""
    depth = x.shape[1]
    codes = unpack_codes(words.transpose(0, 1), bits, depth)
    groups = torch.arange(depth, device=x.device) // (group_size or depth)
    weight = (codes - zeros.to(torch.int32).T[:, groups]).float() * scales.T[:, groups]
    y = x.float() @ weight.to(x.dtype).float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _split(slots: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.div(slots, block_size, rounding_mode="floor"), slots % block_size
