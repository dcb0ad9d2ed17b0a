"""What may not be sampled next: ends that come too early, and what a constraint rules out."""

from collections.abc import Collection
from collections.abc import Sequence as Seq

import torch

from tokenmill.engine.sequence import Sequence

#: In the place of -inf: a row of a constraint that allows only what is forbidden still has a best.
FORBIDDEN = -1e30


def forbid_early_end(
    logits: torch.Tensor, seqs: Seq[Sequence], eos_token_ids: Collection[int]
) -> None:
    """Put the ends of rows that have not reached `min_tokens` out of reach, in place."""
    for row, seq in enumerate(seqs):
        if seq.num_output_tokens < seq.params.min_tokens:
            ends = sorted({*eos_token_ids, *seq.params.stop_token_ids})
            logits[row, [t for t in ends if t < logits.shape[1]]] = FORBIDDEN


def packed_masks(seqs: Seq[Sequence]) -> torch.Tensor:
    """What the constraint of each allows next, [C, W] int32: a bit for each token, lowest first."""
    masks = [seq.constraint.allowed() for seq in seqs if seq.constraint]
    if not masks:
        return torch.empty(0, 0, dtype=torch.int32)
    return torch.frombuffer(bytearray().join(masks), dtype=torch.int32).view(len(masks), -1)


def apply_constraints(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    """Set what each row's constraint rules out of `logits` [R, V] to -inf in place."""
    masks = [(row, seq.constraint.allowed()) for row, seq in enumerate(seqs) if seq.constraint]
    if not masks:
        return
    packed = torch.frombuffer(bytearray().join(mask for _, mask in masks), dtype=torch.uint8)
    packed = packed.view(len(masks), -1).to(logits.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> bits) & 1).view(len(masks), -1)[:, : logits.shape[1]]
    rows = torch.tensor([row for row, _ in masks], device=logits.device)
    logits[rows] = logits[rows].masked_fill_(allowed == 0, -torch.inf)
