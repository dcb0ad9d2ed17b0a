"""`logprobs_of`, `prompt_logprobs`: how likely tokens were, by the model's own distribution."""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch

from tokenmill.engine.scheduler import Chunk
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.logprobs import TokenLogprobs

#: Logits that are worked on at a time: 32 MiB of them, and a few times that in intermediates.
SLICE_ELEMENTS = 1 << 23


def logprobs_of(
    logits: torch.Tensor, token_ids: Seq[int], num_top: Seq[int]
) -> list[TokenLogprobs]:
    """Of `logits` [R, V] float32: row r's token `token_ids[r]` and its `num_top[r]` likeliest."""
    chosen = torch.tensor(token_ids, device=logits.device)
    rows = told_of(token_ids, *measure(logits, chosen, max(num_top)))
    return [
        row if len(row.top) == count else replace(row, top=row.top[:count])
        for row, count in zip(rows, num_top, strict=True)
    ]


def measure(
    logits: torch.Tensor, chosen: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of `logits` [R, V]: how likely `chosen` [R] are, and which are likeliest, and how likely.

    Shapes [R], [R, num_top] and [R, num_top]; nothing is read back.
    """
    total = logsumexp(logits)
    values = (logits.gather(1, chosen[:, None]) - total).flatten()
    best = logits.topk(num_top, dim=-1)
    return values, best.indices, best.values - total


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Of `logits` [R, V], [R, 1]: of a row alone the same bits as of that row among others.

    Torch divides one long sum among its threads on a CPU, and several not; a GPU has a kernel.
    """
    if logits.is_cuda:
        from tokenmill.kernels import logsumexp as on_gpu

        return on_gpu.logsumexp(logits)[:, None]
    rows = logits.expand(2, -1) if len(logits) == 1 else logits
    return rows.logsumexp(dim=-1, keepdim=True)[: len(logits)]


def told_of(
    token_ids: Seq[int], values: torch.Tensor, top_ids: torch.Tensor, top_values: torch.Tensor
) -> list[TokenLogprobs]:
    """What `measure` found of these tokens."""
    rows = zip(token_ids, values.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    return [
        TokenLogprobs(token, value, tuple(zip(ids, tops, strict=True)))
        for token, value, ids, tops in rows
    ]


def slices(count: int, vocabulary: int) -> Iterator[slice]:
    """Rows 0 to `count` in parts whose logits fit `SLICE_ELEMENTS`."""
    size = max(1, SLICE_ELEMENTS // vocabulary)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def prompt_positions(chunk: Chunk) -> range:
    """Positions of a chunk whose logits tell of a prompt token that has not been told of yet."""
    seq, end = chunk.seq, chunk.start + chunk.length
    if seq.params.prompt_logprobs is None:
        return range(0)
    return range(max(chunk.start, seq.num_told_tokens - 1), min(end, seq.num_prompt_tokens - 1))


def prompt_logprobs(
    chunks: Iterable[Chunk],
    logits_of: Callable[[int, int], torch.Tensor],
    *,
    first: int,
    vocabulary: int,
) -> Iterator[tuple[Sequence, tuple[TokenLogprobs, ...]]]:
    """What a step tells of the prompts in it, from the logits of `prompt_positions`.

    `logits_of(start, stop)` gives those of wanted tokens of the step; `first` is the first of them.

    The logits are made in slices, so that a long prompt takes no more memory than a short one.
    """
    done = first
    for chunk in chunks:
        positions, seq = prompt_positions(chunk), chunk.seq
        told: list[TokenLogprobs] = []
        for rows in slices(len(positions), vocabulary):
            part = positions[rows]
            ids = [seq.token_ids[p + 1] for p in part]
            logits = logits_of(done, done + len(part))
            told += logprobs_of(logits, ids, [seq.params.prompt_logprobs or 0] * len(part))
            done += len(part)
        if told:
            seq.num_told_tokens = positions[-1] + 2
            yield seq, tuple(told)
