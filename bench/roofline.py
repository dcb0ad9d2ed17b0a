"""`Roofline`: what a workload asks of the machine, counted from shapes, over measured ceilings.

Operations: every token passes every linear but the head; each generated token one row of the head;
attention multiplies each query with every key before it, then the weights with the values. Of the
last layer a token of a prompt needs keys and values alone, but for the last one. Bytes: the weights
once in each of the fewest steps that there can be (the longest output), and the keys and values
before each generated token. Whichever takes longer at its ceiling is the bound. `step_need` counts
one step, of mixtures of experts too.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.spec import ModelSpec

_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most that the machine was seen to do: operations and bytes a second."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Need:
    """What a workload takes at the least."""

    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Time at the ceilings, computing and reading side by side."""
        return max(self.flops / ceilings.flops_per_s, self.bytes / ceilings.bytes_per_s)


def measure_ceilings() -> Ceilings:
    """The best of the large float32 products, plain and packed, and of reading memory; 2 s."""
    with torch.inference_mode():
        square = torch.randn(2048, 2048)
        best = 2 * 2048**3 / _fastest(lambda: square @ square)
        rows, layer = torch.randn(512, 1024), Linear(torch.randn(4096, 1024))
        layer.pack()
        best = max(best, 2 * 512 * 1024 * 4096 / _fastest(lambda: layer(rows)))
        memory = torch.ones(64 << 20)  # 256 MiB: more than any cache here
        return Ceilings(best, memory.nbytes / _fastest(memory.sum))


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def need(
    spec: ModelSpec,
    requests: Iterable[tuple[int, int]],
    weight_bytes: int = 4,
    kv_bytes: int = 4,
) -> Need:
    """Of requests given as (prompt tokens, generated tokens), for dense models."""
    if spec.moe is not None:
        raise ValueError("the roofline counts dense models, got a mixture of experts")
    hidden, heads = spec.hidden_size, spec.q_size
    inner = spec.intermediate_size * (3 if spec.gated else 2)
    after_keys = hidden * (2 * heads + inner)  # of a layer, what is not its keys and values
    body = spec.num_layers * (after_keys + hidden * 2 * spec.kv_size)
    head = hidden * spec.vocab_size
    flops, kv_read, steps = 0.0, 0, 0
    for prompt, output in requests:
        computed = prompt + output - 1  # the last token is not computed on
        pairs = computed * (computed + 1) // 2
        flops += 2 * body * computed + 2 * head * output + 4 * spec.num_layers * heads * pairs
        flops -= 2 * after_keys * (prompt - 1) + 4 * heads * (prompt - 1) * prompt // 2
        kv_read += sum(range(prompt + 1, computed + 1))
        steps = max(steps, output)
    kv_token_bytes = spec.kv_token_elements * kv_bytes
    return Need(flops, (body + head) * weight_bytes * steps + kv_read * kv_token_bytes)


def step_need(
    spec: ModelSpec,
    chunks: Sequence[tuple[int, int]],
    weight_bytes: float = 2,
    kv_bytes: float = 2,
) -> Need:
    """Of one step of chunks (start, length), the last token of each of which goes to the head.

    Of a mixture of experts, those weights are read that so many tokens would choose by chance.
    """
    tokens = sum(length for _, length in chunks)
    attention = spec.hidden_size * 2 * (spec.q_size + spec.kv_size)
    used = spec.hidden_size * spec.intermediate_size * (3 if spec.gated else 2)
    read = float(used)
    if (moe := spec.moe) is not None:
        expert = spec.hidden_size * moe.intermediate_size * 3
        used = moe.top_k * expert
        read = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** tokens) * expert
    head = spec.hidden_size * spec.vocab_size
    pairs = sum(length * start + length * (length + 1) // 2 for start, length in chunks)
    flops = 2 * spec.num_layers * ((attention + used) * tokens + 2 * spec.q_size * pairs)
    kv_tokens = sum(start + length for start, length in chunks)
    return Need(
        flops + 2 * head * len(chunks),
        (spec.num_layers * (attention + read) + head) * weight_bytes
        + kv_tokens * spec.kv_token_elements * kv_bytes,
    )
