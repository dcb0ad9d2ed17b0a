"""`kv_memory`: the KV cache of a GPU is what the largest step leaves of its memory.

    total   [ weights | largest step ........ | KV cache ........ | reserve ]

The largest step is run once, on a cache of two blocks: as many tokens and sequences as a step can
have, one of them at the longest context, with log probabilities. What it took at its peak is
measured by torch's allocator; the reserve is for what that does not see, and for rows and graphs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenmill.engine.errors import OutOfMemory
from tokenmill.engine.kv_cache import default_kv_memory
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.messages import CacheSize
from tokenmill.engine.probe import Probe, Shape, sequence_of
from tokenmill.engine.runner import Runner
from tokenmill.engine.sampler import sample

#: Share of a GPU's whole memory that nothing is planned for.
RESERVE = 0.04


class Memory(Protocol):
    """What is asked about a device's memory."""

    def free(self) -> tuple[int, int]:
        """Bytes that nobody uses, and all there are."""
        ...

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """The list gets the bytes that were in use at once, beside those from before."""
        ...


class CudaMemory:
    """A GPU's. Never run on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return free, total

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        torch.cuda.reset_peak_memory_stats(self._device)
        before, found = torch.cuda.memory_allocated(self._device), list[int]()
        yield found
        torch.cuda.synchronize(self._device)
        found.append(torch.cuda.max_memory_allocated(self._device) - before)


@dataclass(frozen=True, slots=True)
class Most:
    """The most that a step can have, and the longest sequence."""

    num_tokens: int
    num_seqs: int
    max_model_len: int

    def shapes(self) -> list[Shape]:
        """One sequence at the end of its context, the others with all tokens between them."""
        others = max(self.num_seqs - 1, 1)
        left = max(self.num_tokens - 1, 0)
        lengths = [left // others + (n < left % others) for n in range(others)]
        return [
            (self.max_model_len - 1, 1),
            *((0, min(n, self.max_model_len)) for n in lengths if n),
        ]


def kv_memory(
    model: LoadedModel,
    most: Most,
    size: CacheSize,
    memory: Memory | None = None,
    *,
    kept: int = 0,
    num_pools: int = 1,
) -> int:
    """Bytes that the KV cache of a rank may take, its weights being there already.

    `kept`: what an executor keeps for its rows; `num_pools`: 2 where graphs have memory for a
    step of their own. It is `default_kv_memory` on a CPU and for a model divided among ranks.

    Raises:
        OutOfMemory: the device does not hold the largest step beside the weights.
    """
    if memory is None and (model.device.type != "cuda" or model.group.shard.size > 1):
        return default_kv_memory(model.device)
    memory = memory or CudaMemory(model.device)
    try:
        with memory.peak() as found:
            run_largest(model, most, size)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_refusal(model, most, f"does not fit: {error}")) from error
    free, total = memory.free()
    needed = found[0] * num_pools + kept
    left = free - needed - int(RESERVE * total)
    if left <= 0:
        taken = f"takes {_gib(needed)} of {_gib(free)} that are free of {_gib(total)}"
        raise OutOfMemory(_refusal(model, most, taken))
    return left


@torch.inference_mode()
def run_largest(model: LoadedModel, most: Most, size: CacheSize) -> None:
    """Run the largest step, and draw from it with all that is asked for at once."""
    shapes = most.shapes()
    logits = Probe(Runner(model.spec, model.weights, size, model.group)).logits(shapes)
    asked = {"temperature": 1.0, "top_p": 0.9, "logprobs": 5}
    seqs = [sequence_of(1, model.spec.vocab_size, **asked) for _ in shapes]
    sample(logits, seqs, model.tokenizer.eos_token_ids)


def _refusal(model: LoadedModel, most: Most, why: str) -> str:
    return (
        f"{model.name} leaves no room for a KV cache on {model.device}: beside its weights a step "
        f"of {most.num_tokens} tokens and {most.num_seqs} sequences {why}; lower --token-budget, "
        "--max-num-seqs or --max-model-len, or choose a smaller model"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
