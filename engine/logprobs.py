"""`logprobs_of`, `prompt_logprobs`: how likely tokens were, by the model's own distribution."""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq

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
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    values: list[float] = (logits.gather(1, chosen) - total).flatten().tolist()
    best = logits.topk(max(num_top), dim=-1)
    best_ids, best_values = best.indices.tolist(), (best.values - total).tolist()
    return [
        TokenLogprobs(token, value, tuple(zip(ids[:count], tops[:count], strict=True)))
        for token, value, ids, tops, count in zip(
            token_ids, values, best_ids, best_values, num_top, strict=True
        )
    ]


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
    step, done = max(1, SLICE_ELEMENTS // vocabulary), first
    for chunk in chunks:
        positions, seq = prompt_positions(chunk), chunk.seq
        told: list[TokenLogprobs] = []
        for start in range(0, len(positions), step):
            part = positions[start : start + step]
            ids = [seq.token_ids[p + 1] for p in part]
            logits = logits_of(done, done + len(part))
            told += logprobs_of(logits, ids, [seq.params.prompt_logprobs or 0] * len(part))
            done += len(part)
        if told:
            seq.num_told_tokens = positions[-1] + 2
            yield seq, tuple(told)
