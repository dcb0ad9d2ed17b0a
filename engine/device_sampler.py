"""`DeviceSampler`: a step's tokens from its logits, on the device.

    bias, penalties, ends that come too early, constraints    changed in place, where asked for
    drawn                                                     `kernels/sampling.py`
    log probabilities                                         of the logits before they are changed

In the order and with the bits of `sampler.py`; nothing here waits for the device.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tokenmill.engine.copies import Tensors, to_device
from tokenmill.engine.device_rows import DeviceRows, LaidOut, Received
from tokenmill.engine.logprobs import measure, slices
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.token_masks import FORBIDDEN, packed_masks

if TYPE_CHECKING:
    from tokenmill.kernels.sampling import Drawn


@dataclass(frozen=True, slots=True)
class Draw:
    """What is asked of a step's tokens; places are those of its sequences."""

    #: Whose token is drawn.
    sampled: list[int]
    #: Whether one of them is drawn by top_k or top_p.
    is_filtered: bool
    #: Whose log probabilities are told: those whose logits are drawn from as they are, and others.
    plain: list[int]
    changed: list[int]
    #: The likeliest tokens told at the most.
    num_top: int
    #: Those with a constraint, and what may come next, as it is now.
    constrained: list[int]
    masks: torch.Tensor  # [C, W] int32
    #: Tokens of the longest sequence with penalties.
    longest: int

    @property
    def asked(self) -> list[int]:
        return self.plain + self.changed

    @classmethod
    def of(cls, seqs: Seq[Sequence], laid_out: LaidOut) -> "Draw":
        """For a step of `seqs`; what they are asked for is copied."""
        special = laid_out.special
        asked = [n for n in special if seqs[n].params.logprobs is not None]
        changed = {n: _is_changed(seqs[n]) for n in asked}
        constrained = [n for n in special if seqs[n].constraint]
        return cls(
            sampled=laid_out.sampled,
            is_filtered=laid_out.is_filtered,
            plain=[n for n in asked if not changed[n]],
            changed=[n for n in asked if changed[n]],
            num_top=max((seqs[n].params.logprobs or 0 for n in asked), default=0),
            constrained=constrained,
            masks=packed_masks([seqs[n] for n in constrained]),
            longest=laid_out.longest,
        )


def _is_changed(seq: Sequence) -> bool:
    params = seq.params
    has_early_end = seq.num_output_tokens < params.min_tokens
    return bool(params.logit_bias or params.has_penalties or seq.constraint or has_early_end)


class DeviceSampler:
    """Draws by the parameters that lie in `rows`."""

    def __init__(self, rows: DeviceRows) -> None:
        self._rows = rows

    def draw(
        self, draw: Draw, logits: torch.Tensor, received: Received, context_lens: torch.Tensor
    ) -> tuple[torch.Tensor, Tensors]:
        """Tokens [S] of `logits` [S, V], which may be changed, and what is told of `asked`.

        The log probabilities [A] of their tokens, and [A, num_top] the likeliest and theirs.
        """
        from tokenmill.kernels import sampling

        resident, rows = self._rows, received.head.rows[: len(logits)]
        raw = logits[self._sent(draw.changed)].float() if draw.changed else logits
        if draw.constrained or received.is_editing:
            logits = logits.float()
            self._edit(draw, logits, received, rows, context_lens)
        drawn = sampling.sample(
            logits,
            rows=rows,
            temperature=resident.temperature,
            top_k=resident.top_k,
            top_p=resident.top_p,
            min_p=resident.min_p,
            seeds=resident.seeds,
            positions=context_lens,
            is_filtered=draw.is_filtered,
        )
        told = self._told(draw, logits, drawn) if draw.plain else []
        if draw.changed:
            chosen = drawn.tokens[self._sent(draw.changed)].clamp_(min=0)
            told.append(measure(raw, chosen, draw.num_top))
        if len(told) < 2:
            return drawn.tokens, told[0] if told else ()
        return drawn.tokens, tuple(torch.cat(parts) for parts in zip(*told, strict=True))

    def _edit(
        self,
        draw: Draw,
        logits: torch.Tensor,
        received: Received,
        rows: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> None:
        """As `sampler.edit`."""
        from tokenmill.kernels import logit_edits, penalties

        resident = self._rows
        if len(received.biased):
            logit_edits.add_cells(
                logits,
                received.biased,
                rows=rows,
                counts=resident.bias_sizes,
                tokens=resident.bias_tokens,
                values=resident.bias_values,
            )
        if len(received.penalized):
            penalties.penalize(
                logits,
                received.penalized,
                received.counted,
                rows=rows,
                lengths=context_lens,
                longest=draw.longest,
                tokens=resident.tokens,
                counts=resident.counts,
                prompts=resident.prompts,
                repetition=resident.repetition,
                presence=resident.presence,
                frequency=resident.frequency,
            )
        if len(received.endless):
            logit_edits.set_cells(
                logits,
                received.endless,
                FORBIDDEN,
                rows=rows,
                counts=resident.ends_sizes,
                tokens=resident.ends,
            )
        if draw.constrained:
            places = torch.tensor(draw.constrained, dtype=torch.int32)
            masks = to_device(draw.masks, logits.device)
            logit_edits.keep_allowed(logits, to_device(places, logits.device), masks)

    def _told(
        self, draw: Draw, logits: torch.Tensor, drawn: "Drawn"
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of those drawn from the model's own distribution: the kernel has measured it."""
        told = []
        for part in slices(len(draw.plain), logits.shape[1]):
            places = self._sent(draw.plain[part])
            if not draw.num_top:  # and nothing as wide as the vocabulary is looked at again
                likeliest = logits.new_empty(len(places), 0)
                told.append((drawn.logprobs[places], likeliest.long(), likeliest))
                continue
            best = logits[places].float().topk(draw.num_top, dim=-1)
            values = best.values - drawn.totals[places][:, None]
            told.append((drawn.logprobs[places], best.indices, values))
        return told

    def _sent(self, numbers: Seq[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self._rows.tokens.device)
