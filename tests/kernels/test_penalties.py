"""Penalties on the device against those of the sampler, to the last bit."""

import pytest
import torch

from tokenmill.engine.penalties import apply_penalties
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.token_counts import TokenCounts
from tokenmill.producer.params import SamplingParams

VOCABULARY, LENGTH, ROWS = 50, 1400, 5
#: Of each sequence its prompt, and repetition, presence and frequency penalty.
SEQUENCES = [
    (3, (1.3, 0.0, 0.0)),
    (300, (0.7, 0.4, -0.3)),
    (1, (1.0, -1.1, 0.7)),
    (40, (1.7, 0.3, 0.1)),
]
#: Of each step the lengths that the sequences have come to; None: not drawn for.
STEPS: list[list[int | None]] = [
    [4, 300, None, 40],
    [5, 301, 260, None],
    [None, 302, 261, 257],
    [600, 303, 262, 258],
    [None, 1300, None, None],
    [None, 1301, None, None],  # a token that is new behind more than are compared at a time
    [None, 1302, None, None],  # one that stands at the begin alone
    [None, 1303, None, 262],
]


def make_sequences() -> list[Sequence]:
    """Of tokens that come again and again, all of them even but two."""
    draw = torch.Generator().manual_seed(5)
    seqs = [
        Sequence(
            seq_id=str(number),
            token_ids=(torch.randint(VOCABULARY, (LENGTH,), generator=draw) // 3 * 2).tolist(),
            num_prompt_tokens=prompt,
            params=SamplingParams(
                repetition_penalty=given[0], presence_penalty=given[1], frequency_penalty=given[2]
            ),
            seed=0,
            max_num_tokens=LENGTH,
        )
        for number, (prompt, given) in enumerate(SEQUENCES)
    ]
    for seq in seqs:
        seq.token_ids[1300] = 49
        seq.token_ids[2] = seq.token_ids[1301] = 47
    return seqs


def cut(seq: Sequence, length: int) -> Sequence:
    return Sequence(
        seq_id="",
        token_ids=seq.token_ids[:length],
        num_prompt_tokens=seq.num_prompt_tokens,
        params=seq.params,
        seed=0,
        max_num_tokens=LENGTH,
    )


class Resident:
    """Rows of the device, where the sequences lie in another order."""

    def __init__(self, seqs: list[Sequence], device: torch.device) -> None:
        self.order = [4, 0, 3, 2]
        self.tokens = torch.full((ROWS, LENGTH), -9, dtype=torch.int32)
        self.counts = torch.full((ROWS, LENGTH), -7, dtype=torch.int32).to(device)
        self.prompts = torch.zeros(ROWS, dtype=torch.int32)
        self.given = torch.zeros(3, ROWS)
        for row, seq in zip(self.order, seqs, strict=True):
            params = seq.params
            self.tokens[row] = torch.tensor(seq.token_ids)
            self.prompts[row] = seq.num_prompt_tokens
            self.given[:, row] = torch.tensor(
                [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
            )
        self.tokens, self.prompts = self.tokens.to(device), self.prompts.to(device)
        self.given = self.given.to(device)

    def penalize(self, logits: torch.Tensor, steps: list[tuple[int, int, int]]) -> torch.Tensor:
        """Of places: how many tokens were counted before, and the lengths."""
        from tokenmill.kernels.penalties import penalize

        device = self.counts.device
        lengths = torch.full((len(self.order),), -9, dtype=torch.int32)
        for place, _, length in steps:
            lengths[place] = length
        changed = logits.to(device)
        penalize(
            changed,
            torch.tensor([place for place, _, _ in steps], dtype=torch.int32, device=device),
            torch.tensor([counted for _, counted, _ in steps], dtype=torch.int32, device=device),
            rows=torch.tensor(self.order, dtype=torch.int32, device=device),
            lengths=lengths.to(device),
            longest=max(length for _, _, length in steps),
            tokens=self.tokens,
            counts=self.counts,
            prompts=self.prompts,
            repetition=self.given[0],
            presence=self.given[1],
            frequency=self.given[2],
        )
        return changed.cpu()


def test_they_are_the_samplers_from_step_to_step(device: torch.device) -> None:
    seqs = make_sequences()
    resident, counted = Resident(seqs, device), [0] * len(seqs)
    for number, step in enumerate(STEPS):
        drawn = [(place, n) for place, n in enumerate(step) if n is not None]
        draw = torch.Generator().manual_seed(number)
        logits = 4 * torch.randn(len(seqs), VOCABULARY, generator=draw)
        expected = logits.clone()
        for place, length in drawn:
            apply_penalties(expected[place : place + 1], [cut(seqs[place], length)])
        found = resident.penalize(logits, [(p, counted[p], n) for p, n in drawn])
        assert found.equal(expected)
        for place, length in drawn:
            counted[place] = length
            kept = resident.counts[resident.order[place]].cpu()
            counts = TokenCounts(seqs[place].num_prompt_tokens)
            counts.update(seqs[place].token_ids[:length])
            assert kept[:length][kept[:length] >= 0].tolist() == [int(n) for n in counts.counts]


def test_counts_of_another_shape_are_refused(device: torch.device) -> None:
    resident = Resident(make_sequences(), device)
    resident.counts = resident.counts[:, 1:]
    with pytest.raises(ValueError, match=r"^counts: expected shape \[5, 1400\], got \[5, 1399\]"):
        resident.penalize(torch.zeros(4, VOCABULARY), [(0, 0, 3)])
