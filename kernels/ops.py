"""The kernels by name: Triton for CUDA tensors; for others compiled by numba, or plain torch.

Shapes and meaning are in `reference.py`. The Triton files are imported at the first CUDA call, so
that a process on a CPU never loads triton, and a process on a GPU never numba.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tokenmill.kernels import compiler, cpu_attention, reference

if TYPE_CHECKING:
    from tokenmill.kernels.compiled_low_rank import Panels


def load_compiled() -> None:
    """Load what the CPU's kernels need, half a second's work that can be done beside other work."""
    if not compiler.is_available():
        return
    others = ["compiled_rows", "compiled_draw", "compiled_filter"]
    if compiler.has_wide_vectors():
        others += ["compiled_linear", "compiled_panels", "program"]
    if compiler.has_byte_products():
        others += ["compiled_int8"]
    names = [f"{__package__}.{name}" for name in others]
    beside = compiler.compile_beside(names)
    importlib.import_module(f"{__package__}.compiled_attention")  # the longest to compile
    if beside is not None:
        compiler.wait_for(beside)
    for name in names:
        importlib.import_module(name)


def can_dequantize(ggml_type: int) -> bool:
    """Whether `dequantize` takes blocks of this type of GGUF."""
    if not compiler.has_wide_vectors():
        return False
    from tokenmill.kernels import compiled_blocks

    return ggml_type in compiled_blocks.BLOCK_BYTES


def dequantize(stored: Any, ggml_type: int, values: torch.Tensor) -> None:
    """Write what `stored`, the bytes of blocks as uint8, stands for to contiguous `values`."""
    from tokenmill.kernels import compiled_blocks

    compiled_blocks.dequantize(stored, ggml_type, values)


def has_programs(weight: torch.Tensor) -> bool:
    """Whether compiled kernels of models with such weights can be called as one `Program`."""
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_plain and compiler.has_wide_vectors()


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


def can_pack(weight: torch.Tensor) -> bool:
    """Whether `packed_linear` of a weight [N, K] is the fastest here."""
    if not compiler.has_wide_vectors():
        return False
    from tokenmill.kernels import compiled_linear

    return compiled_linear.can_pack(weight)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lay out a weight [N, K] for `packed_linear`, in its own memory if that is contiguous."""
    from tokenmill.kernels import compiled_panels

    return compiled_panels.pack(weight)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x [T, K] @ weight.T + bias [N], of a weight that `pack` has laid out."""
    from tokenmill.kernels import compiled_linear

    return compiled_linear.linear(x, packed, bias)


def pack_low_rank(down: torch.Tensor, up: torch.Tensor) -> "Panels":
    """Lay out an adapter's down [r, K] and up [N, r], which `can_pack` takes, in new memory."""
    from tokenmill.kernels import compiled_low_rank

    return compiled_low_rank.pack(down, up)


def add_low_rank(y: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, panels: "Panels") -> None:
    """y[rows] [R, N] += what an adapter makes of x[rows] [R, K]; `rows` int64, each once."""
    from tokenmill.kernels import compiled_low_rank

    compiled_low_rank.add_low_rank(y, x, rows, panels)


def can_pack_int8(weight: torch.Tensor) -> bool:
    """Whether `packed_int8_linear` of a weight [N, K] can be had here."""
    if not compiler.has_byte_products():
        return False
    from tokenmill.kernels import compiled_int8

    return compiled_int8.can_pack(weight)


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """Lay out a weight's codes, int8 [N, K], for `packed_int8_linear`, in new memory."""
    from tokenmill.kernels import compiled_int8

    return compiled_int8.pack(codes)


def packed_int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x [T, K] @ weight.T + bias, of codes that `pack_int8` laid out, and scales [N]."""
    from tokenmill.kernels import compiled_int8

    return compiled_int8.linear(x, packed, weight_scales, bias)


def can_filter(logits: torch.Tensor) -> bool:
    """Whether `keep_likely` takes logits [R, V]."""
    if not compiler.is_available():
        return False
    from tokenmill.kernels import compiled_filter

    return compiled_filter.can_filter(logits)


def keep_likely(logits: torch.Tensor, params: list[tuple[float, float, float]]) -> None:
    """Set to -inf what top_k, top_p and min_p of each row leave out of `logits` [R, V]."""
    from tokenmill.kernels import compiled_filter

    compiled_filter.keep_likely(logits, params)


def can_draw(logits: torch.Tensor) -> bool:
    """Whether `draw` takes logits [R, V]."""
    if not compiler.is_available():
        return False
    from tokenmill.kernels import compiled_draw

    return compiled_draw.can_draw(logits)


def draw(logits: torch.Tensor, keys: list[int]) -> list[int]:
    """The token of each row of `logits` [R, V] by Gumbel noise, keyed by 64 bits a row."""
    from tokenmill.kernels import compiled_draw

    return compiled_draw.draw(logits, keys)


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
