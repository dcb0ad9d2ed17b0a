"""The kernels by name: Triton for CUDA tensors; for others compiled by numba, or plain torch.

Shapes and meaning are in `reference.py`. The Triton files are imported at the first CUDA call, so
that a process on a CPU never loads triton, and a process on a GPU never numba. What only a CPU
has, packed linears and drawing among it, is in `cpu_ops.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tokenmill.kernels import compiler, cpu_attention, reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row of `x` [T, H] to unit root mean square, times `weight` [H]."""
    if x.is_cuda:
        from tokenmill.kernels import rms_norm as on_gpu

        return on_gpu.rms_norm(x, weight, eps)
    if compiler.is_available():
        from tokenmill.kernels import compiled_rows

        if compiled_rows.can_norm(x):
            return compiled_rows.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    post: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed sum and the sum, both [T, H]; `residual` may have become the sum.

    `post`: what `x` is normed by before it is added. Without a weight the sum comes twice.
    """
    if x.is_cuda:
        from tokenmill.kernels import rms_norm as on_gpu

        return on_gpu.add_rms_norm(x, residual, weight, eps, post=post)
    if post is not None:
        x = rms_norm(x, post, eps)
    if weight is not None and compiler.is_available():
        from tokenmill.kernels import compiled_rows

        if compiled_rows.can_norm(x) and residual.is_contiguous():
            return compiled_rows.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Norm the rows of `x` [T, H] to mean 0 and variance 1, times `weight`, plus `bias`."""
    if x.is_cuda:
        from tokenmill.kernels import layer_norm as on_gpu

        return on_gpu.layer_norm(x, weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed sum and the sum, both [T, H]; `residual` may have become the sum."""
    if x.is_cuda:
        from tokenmill.kernels import layer_norm as on_gpu

        return on_gpu.add_layer_norm(x, residual, weight, bias, eps)
    return reference.add_layer_norm(x, residual, weight, bias, eps)


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Apply one of `reference.ACTIVATIONS` to each element of `x` [T, I]."""
    if x.is_cuda:
        from tokenmill.kernels import gated_activation as on_gpu

        return on_gpu.activation(x, kind)
    return reference.ACTIVATIONS[kind](x)


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """Return `kind(gate) * up` [T, I] for `gate_up` [T, 2I]."""
    if gate_up.is_cuda:
        from tokenmill.kernels import gated_activation as on_gpu

        return on_gpu.gated_activation(gate_up, kind)
    if compiler.is_available():
        from tokenmill.kernels import compiled_rows

        if compiled_rows.can_gate(gate_up, kind):
            return compiled_rows.gated_activation(gate_up)
    return reference.gated_activation(gate_up, kind)


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Return `cap * tanh(logits / cap)` in float32, for logits [R, V], which may change."""
    if logits.is_cuda:
        from tokenmill.kernels import soft_cap as on_gpu

        return on_gpu.soft_cap(logits, cap)
    return logits.float().div_(cap).tanh_().mul_(cap)


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
    """Norm `q` and `k` where norms are given, turn them, write `k` and `v` into the caches.

    Returns the queries, which may be `q` itself; what `q` and `k` hold then is not said.
    """
    if q.is_cuda:
        from tokenmill.kernels import rope_kv as on_gpu

        given = (q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache)
        return on_gpu.rope_store_kv(*given, q_norm=q_norm, k_norm=k_norm, eps=eps)
    if q_norm is not None and k_norm is not None:
        q, k = _norm_heads(q, q_norm, eps), _norm_heads(k, k_norm, eps)
    if compiler.is_available():
        from tokenmill.kernels import compiled_rows

        if compiled_rows.can_rotate(q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache):
            compiled_rows.rope_store_kv(q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache)
            return q
    return reference.rope_store_kv(q, k, v, positions, cos_sin, slot_mapping, k_cache, v_cache)


def _norm_heads(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm [T, heads, D] in rows as wide as the norm: of one head, or of all of them."""
    return rms_norm(heads.reshape(-1, weight.shape[0]), weight, eps).view(heads.shape)


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
    fixed_tiles: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of ragged chunks over the blocked KV cache; returns [T, Hq, D].

    With `fixed_tiles` a row has the same bits in any batch and however its sequence is cut into
    chunks; on a GPU that is slower, and a CPU does so anyway (decision 14).
    """
    attend: Callable[..., torch.Tensor] = _attention_on_cpu
    if q.is_cuda:
        attend = partial(_attention_on_gpu, fixed_tiles=fixed_tiles)
    return attend(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=cu_seqlens_q,
        context_lens=context_lens,
        block_tables=block_tables,
        max_query_len=max_query_len,
        scale=scale,
        window=window,
        softcap=softcap,
        out=out,
    )


def _attention_on_gpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    max_query_len: int,
    out: torch.Tensor | None,
    fixed_tiles: bool = False,
    **arguments: Any,
) -> torch.Tensor:
    """Sequences that decode and longer chunks, each by their kernel, in one result.

    With `fixed_tiles` all by the one for chunks.
    """
    from tokenmill.kernels import decode_attention, paged_attention

    if fixed_tiles:
        return paged_attention.paged_attention(
            q, k_cache, v_cache, **arguments, max_query_len=max_query_len, out=out
        )
    if max_query_len > 1:
        out = paged_attention.paged_attention(
            q, k_cache, v_cache, **arguments, max_query_len=max_query_len, skip_single=True, out=out
        )
    return decode_attention.decode_attention(q, k_cache, v_cache, **arguments, out=out)


def _attention_on_cpu(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    """The compiled form where numba is there and it takes the arguments; else torch's own ops."""
    attend: Callable[..., torch.Tensor] = cpu_attention.paged_attention
    if compiler.is_available():
        from tokenmill.kernels import compiled_attention

        if compiled_attention.can_attend(q, k_cache, v_cache, **arguments):
            attend = compiled_attention.paged_attention
    return attend(q, k_cache, v_cache, **arguments)


def dequant_linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    fixed_tiles: bool = False,
) -> torch.Tensor:
    """Return x [M, K] times a weight [N, K] of 4 or 8 bits, laid out as in `packed_codes.py`.

    On a GPU a row has the same bits in any batch with `fixed_tiles`.
    """
    multiply: Callable[..., torch.Tensor] = reference.dequant_linear
    if x.is_cuda:
        from tokenmill.kernels import dequant_gemm as on_gpu

        multiply = partial(on_gpu.dequant_linear, fixed_tiles=fixed_tiles)
    return multiply(x, words, scales, zeros, bias, bits=bits, group_size=group_size)


def fixed_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [M, K] @ w.T + bias, of a plain weight [N, K]; on a GPU with bits of a row's own."""
    if x.is_cuda:
        from tokenmill.kernels import fixed_linear as on_gpu

        return on_gpu.fixed_linear(x, w, bias)
    return torch.nn.functional.linear(x, w, bias)
