"""Logit bias and penalties of a batch: what changes logits by the tokens so far.

In this order, as vLLM does (definitions of OpenAI and, for repetition, of arXiv 1909.05858):

    logit_bias          z[t] += bias[t]
    repetition_penalty  z[t] = z[t] / r if z[t] > 0 else z[t] * r    t in prompt or output
    frequency_penalty   z[t] -= f * (times t is in the output)
    presence_penalty    z[t] -= p                                    t in the output

Only the logits that change are touched, in one gather and one scatter for the whole batch.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch

from tokenmill.engine.copies import to_device
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.token_counts import TokenCounts


def apply_bias(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    """Add each row's `logit_bias` to `logits` [R, V] in place."""
    biased = [(row, seq.params.logit_bias) for row, seq in enumerate(seqs) if seq.params.logit_bias]
    if not biased:
        return
    rows = torch.tensor([row for row, bias in biased for _ in bias])
    tokens = torch.tensor([token for _, bias in biased for token in bias])
    values = torch.tensor([v for _, bias in biased for v in bias.values()], dtype=logits.dtype)
    places = to_device(rows, logits.device), to_device(tokens, logits.device)
    logits[places] += to_device(values, logits.device)


def apply_penalties(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    """Apply each row's penalties to `logits` [R, V] float32 in place."""
    rows = [row for row, seq in enumerate(seqs) if seq.params.has_penalties]
    if not rows:
        return
    device, params = logits.device, [seqs[row].params for row in rows]
    counted = [_counts(seqs[row]) for row in rows]
    sizes = torch.tensor([len(c.token_ids) for c in counted])
    total = sum(len(c.token_ids) for c in counted)

    def spread(values: list[int] | list[float]) -> torch.Tensor:
        return to_device(torch.tensor(values).repeat_interleave(sizes, output_size=total), device)

    row = spread(rows)
    token = to_device(_joined((c.token_ids for c in counted), torch.int64), device)
    count = to_device(_joined((c.counts for c in counted), torch.float32), device)
    value = logits[row, token]
    repetition = spread([float(p.repetition_penalty) for p in params])
    value = torch.where(value > 0, value / repetition, value * repetition)
    value -= count * spread([float(p.frequency_penalty) for p in params])
    value -= (count > 0) * spread([float(p.presence_penalty) for p in params])
    logits[row, token] = value


def _counts(seq: Sequence) -> TokenCounts:
    if seq.counts is None:
        seq.counts = TokenCounts(seq.num_prompt_tokens)
    seq.counts.update(seq.token_ids)
    return seq.counts


def _joined(arrays: Iterable["array[int] | array[float]"], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray().join(arrays), dtype=dtype)
