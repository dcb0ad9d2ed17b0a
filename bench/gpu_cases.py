"""The launches that `gpu_kernels.py` times, and what each takes at the least.

A kernel's need is counted from its shapes: bytes that must move, operations that must be done.
Decode attention at batch 1-256 and contexts 512-32k, chunk attention from 4k on, with heads as in
Llama-3.1-8B; sampling with Qwen3's vocabulary; experts of Mixtral's shapes; linears of 4 and 8 bits
(`gpu_linears.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gpu_linears
import torch

from tokenmill.kernels.batch_rows import build_step
from tokenmill.kernels.decode_attention import decode_attention
from tokenmill.kernels.expert_order import sort_by_expert
from tokenmill.kernels.gated_activation import gated_activation
from tokenmill.kernels.moe import grouped_linear, route, sum_experts
from tokenmill.kernels.paged_attention import paged_attention
from tokenmill.kernels.penalties import penalize
from tokenmill.kernels.rms_norm import add_rms_norm
from tokenmill.kernels.rope_kv import rope_store_kv
from tokenmill.kernels.sampling import sample

#: Share of the free memory that the keys and values of a case may take.
MEMORY_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class Scale:
    """The shapes of a run."""

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    block_size: int = 64
    batches: tuple[int, ...] = (1, 8, 64, 256)
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768)
    prompts: tuple[int, ...] = (4096, 8192, 16384)
    rows: tuple[int, ...] = (1, 64, 2048)
    hidden: int = 4096
    inner: int = 14336
    experts: tuple[int, int] = (8, 2)
    vocabulary: int = 151936
    linears: tuple[tuple[int, int], ...] = ((28672, 4096), (4096, 14336))

    @property
    def is_timed(self) -> bool:
        return self.device.type == "cuda"


TINY = Scale(
    torch.device("cpu"),
    torch.float32,
    heads=(4, 2),
    head_dim=16,
    block_size=16,
    batches=(1, 3),
    contexts=(40, 70),
    prompts=(70,),
    rows=(1, 5),
    hidden=32,
    inner=24,
    experts=(4, 2),
    vocabulary=50,
    linears=((24, 128),),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A launch, and what it takes at the least."""

    kernel: str
    shape: str
    run: Callable[[], object]
    bytes: float = 0.0
    flops: float = 0.0


def random(scale: Scale, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=scale.device, dtype=scale.dtype)


def integers(scale: Scale, values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=scale.device)


def cache(scale: Scale, sequences: int, context: int) -> tuple[torch.Tensor, ...]:
    """Keys, values and tables of shuffled blocks.

    Raises:
        OutOfMemoryError: they would take more than their share.
    """
    per_sequence = -(-context // scale.block_size)
    shape = (sequences * per_sequence, scale.block_size, scale.heads[1], scale.head_dim)
    needed = 2 * shape[0] * shape[1] * shape[2] * shape[3] * scale.dtype.itemsize
    if scale.is_timed:
        torch.cuda.empty_cache()
        if needed > MEMORY_SHARE * torch.cuda.mem_get_info()[0]:
            raise torch.OutOfMemoryError(f"{needed} bytes of keys and values")
    order = torch.randperm(shape[0], device=scale.device).to(torch.int32)
    return random(scale, *shape), random(scale, *shape), order.view(sequences, per_sequence)


def decode_cases(scale: Scale) -> Iterator[Case]:
    """All batches and contexts; of some also with a cache of 8 bits, and a head for each query."""
    for batch in scale.batches:
        for context in scale.contexts:
            yield from decode_case(scale, "decode attention", batch, context)
    many = replace(scale, heads=(scale.heads[0], scale.heads[0]))
    for batch, context in zip(scale.batches[1:3], scale.contexts[1:3], strict=False):
        yield from decode_case(scale, "decode, fp8 KV", batch, context, torch.float8_e4m3fn)
        yield from decode_case(many, "decode, no groups", batch, context)


def decode_case(
    scale: Scale, name: str, batch: int, context: int, kind: torch.dtype | None = None
) -> Iterator[Case]:
    """One, if its keys and values fit."""
    heads, kv_heads = scale.heads
    try:
        keys, values, tables = cache(scale, batch, context)
    except torch.OutOfMemoryError:
        return
    keys, values = keys.to(kind or scale.dtype), values.to(kind or scale.dtype)
    q = random(scale, batch, heads, scale.head_dim)
    yield Case(
        name,
        f"{batch} x {context}",
        partial(
            decode_attention,
            q,
            keys,
            values,
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=q.device),
            context_lens=integers(scale, [context] * batch),
            block_tables=tables,
            scale=0.1,
        ),
        bytes=2 * batch * context * kv_heads * scale.head_dim * keys.itemsize + 2 * q.nbytes,
        flops=4 * batch * context * heads * scale.head_dim,
    )


def chunk_cases(scale: Scale) -> Iterator[Case]:
    heads = scale.heads[0]
    for length in scale.prompts:
        for before in (0, length):
            keys, values, tables = cache(scale, 1, before + length)
            q = random(scale, length, heads, scale.head_dim)
            pairs = length * before + length * (length + 1) // 2
            yield Case(
                "chunk attention",
                f"{length} behind {before}",
                partial(
                    paged_attention,
                    q,
                    keys,
                    values,
                    cu_seqlens_q=integers(scale, [0, length]),
                    context_lens=integers(scale, [before + length]),
                    block_tables=tables,
                    max_query_len=length,
                    scale=0.1,
                ),
                bytes=2 * q.nbytes + keys.nbytes + values.nbytes,
                flops=4 * pairs * heads * scale.head_dim,
            )


def row_cases(scale: Scale) -> Iterator[Case]:
    for rows in scale.rows:
        x, residual = random(scale, rows, scale.hidden), random(scale, rows, scale.hidden)
        weight = random(scale, scale.hidden)
        yield Case(
            "add + RMSNorm",
            f"{rows} x {scale.hidden}",
            partial(add_rms_norm, x, residual, weight, 1e-5),
            bytes=4 * x.nbytes,
        )
        gate_up = random(scale, rows, 2 * scale.inner)
        yield Case(
            "SiLU * up",
            f"{rows} x {scale.inner}",
            partial(gated_activation, gate_up, "silu"),
            bytes=1.5 * gate_up.nbytes,
        )
        yield rope_case(scale, "RoPE + KV write", rows, scale.dtype)
        norm = torch.ones(scale.head_dim, device=scale.device)
        norms = {"q_norm": norm, "k_norm": norm, "eps": 1e-6}
        yield rope_case(scale, "norms, RoPE + fp8 KV write", rows, torch.float8_e4m3fn, **norms)


def rope_case(scale: Scale, name: str, rows: int, held: torch.dtype, **norms: Any) -> Case:
    heads, kv_heads = scale.heads
    qkv = random(scale, rows, heads + 2 * kv_heads, scale.head_dim)
    keys, values = (tensor.to(held) for tensor in cache(scale, 1, rows)[:2])
    places = torch.arange(rows, device=scale.device)
    angles = torch.rand(rows, scale.head_dim, device=scale.device)
    parts = qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    return Case(
        name,
        f"{rows} tokens",
        partial(rope_store_kv, *parts, places, angles, places, keys, values, **norms),
        bytes=qkv.nbytes + parts[0].nbytes + 2 * parts[2].numel() * held.itemsize,
    )


def sampling_cases(scale: Scale) -> Iterator[Case]:
    for rows in scale.rows[:2]:
        for name, top_k, top_p in (("plain", 0, 1.0), ("top_k 50", 50, 1.0), ("top_p 0.9", 0, 0.9)):
            logits = 4 * random(scale, rows, scale.vocabulary)  # as flat as a trained model's
            ones = torch.ones(rows, device=scale.device)
            seeds = torch.arange(rows, device=scale.device)
            yield Case(
                "sampling",
                f"{rows} x {scale.vocabulary}, {name}",
                partial(
                    sample,
                    logits,
                    temperature=ones,
                    top_k=integers(scale, [top_k] * rows),
                    top_p=top_p * ones,
                    min_p=0 * ones,
                    seeds=seeds,
                    positions=seeds,
                    is_filtered=name != "plain",
                ),
                bytes=logits.nbytes,
            )


def penalty_cases(scale: Scale) -> Iterator[Case]:
    """Of a decode step: one token more than are counted."""
    for rows, context in ((1, scale.contexts[-1]), (scale.rows[1], scale.contexts[0])):
        shape = (rows, context)
        tokens = torch.randint(scale.vocabulary, shape, device=scale.device, dtype=torch.int32)
        numbers, ones = integers(scale, list(range(rows))), torch.ones(rows, device=scale.device)
        logits = random(scale, rows, scale.vocabulary).float()
        yield Case(
            "penalties",
            f"{rows} rows of {context} tokens",
            partial(
                penalize,
                logits,
                numbers,
                integers(scale, [context - 1] * rows),
                rows=numbers,
                lengths=integers(scale, [context] * rows),
                longest=context,
                tokens=tokens,
                counts=torch.ones_like(tokens),
                prompts=0 * numbers,
                repetition=1.1 * ones,
                presence=ones,
                frequency=ones,
            ),
            bytes=rows * context * (4 + 8 + 2 * 32),  # a token, its count, a sector of logits
        )


def moe_cases(scale: Scale) -> Iterator[Case]:
    experts, top_k = scale.experts
    up = random(scale, experts, 2 * scale.inner, scale.hidden)
    down = random(scale, experts, scale.hidden, scale.inner)

    def mixture(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        shares, chosen = route(router, top_k, normalize=True)
        order, ends = sort_by_expert(chosen, experts)
        inner = gated_activation(grouped_linear(x, up, order, ends), "silu")
        return sum_experts(grouped_linear(inner, down, order, ends), shares)

    for rows in scale.rows:
        x, router = random(scale, rows, scale.hidden), random(scale, rows, experts)
        used = len(set(route(router, top_k, normalize=True)[1].flatten().tolist()))
        weights = used * (up[0].numel() + down[0].numel())
        yield Case(
            "experts",
            f"{rows} tokens, {used} of {experts} experts",
            partial(mixture, x, router),
            bytes=weights * scale.dtype.itemsize,
            flops=2 * rows * top_k * (up[0].numel() + down[0].numel()),
        )


def batch_cases(scale: Scale) -> Iterator[Case]:
    for rows in scale.rows[:2]:
        width, length = 64, 4096
        device = scale.device
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        tables = torch.zeros(rows, width, dtype=torch.int32, device=device)
        places = [torch.empty(rows, dtype=torch.int64, device=device) for _ in range(4)]
        build = partial(
            build_step,
            ends[:-1],
            ends,
            tokens=torch.zeros(rows, length, dtype=torch.int32, device=device),
            computed=integers(scale, [length // 2] * rows),
            tables=tables,
            block_size=64,
            ids=places[0],
            positions=places[1],
            slots=places[2],
            context_lens=torch.empty_like(ends[:-1]),
            block_tables=torch.empty_like(tables),
            last_tokens=places[3],
        )
        yield Case(
            "batch building",
            f"{rows} decodes",
            build,
            bytes=8 * rows * width,
        )


def linear_cases(scale: Scale) -> Iterator[Case]:
    """Those of `gpu_linears.py`."""
    for name, shape, run, size, flops in gpu_linears.cases(
        scale.device, scale.dtype, scale.rows, scale.linears
    ):
        yield Case(name, shape, run, bytes=size, flops=flops)


MAKERS = (
    decode_cases,
    chunk_cases,
    row_cases,
    sampling_cases,
    penalty_cases,
    moe_cases,
    batch_cases,
    linear_cases,
)
