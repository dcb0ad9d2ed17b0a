"""Biases, early ends and constraints on the device against those of the sampler, bit by bit."""

import pytest
import torch

from tokenmill.engine.penalties import apply_bias
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.token_masks import FORBIDDEN
from tokenmill.producer.params import SamplingParams

PLACES, ROWS, VOCABULARY = [3, 0], [2, 0, 1, 4], 3000


def random_logits() -> torch.Tensor:
    return torch.randn(len(ROWS), VOCABULARY, generator=torch.Generator().manual_seed(1))


def ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def cells(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """More than a block of row 4, one cell of row 2, and nothing that may be used of the others."""
    tokens = torch.full((5, 200), 1 << 30, dtype=torch.int32)
    draw = torch.Generator().manual_seed(2)
    tokens[4, :150] = torch.randperm(VOCABULARY, generator=draw)[:150].int()
    tokens[2, 0] = VOCABULARY - 1
    values = torch.randn(5, 200, generator=draw) * 3
    return ints([9999, 9999, 1, 9999, 150], device), tokens.to(device), values.to(device)


def test_biases_are_added(device: torch.device) -> None:
    from tokenmill.kernels.logit_edits import add_cells

    counts, tokens, values = cells(device)
    expected, changed = random_logits(), random_logits().to(device)
    seqs = []
    for row, count in ((2, 1), (9, 0), (9, 0), (4, 150)):
        pairs = (
            zip(tokens[row, :count].tolist(), values[row, :count].tolist(), strict=True)
            if count
            else ()
        )
        params = SamplingParams(logit_bias=dict(pairs))
        seqs.append(
            Sequence(
                seq_id="",
                token_ids=[1],
                num_prompt_tokens=1,
                params=params,
                seed=0,
                max_num_tokens=9,
            )
        )
    apply_bias(expected, seqs)
    rows = ints(ROWS, device)
    add_cells(changed, ints(PLACES, device), rows=rows, counts=counts, tokens=tokens, values=values)
    assert changed.cpu().equal(expected)


def test_ends_are_put_out_of_reach(device: torch.device) -> None:
    """Even where a logit is no number; what lies beyond the vocabulary is none of it."""
    from tokenmill.kernels.logit_edits import set_cells

    counts, tokens, _ = cells(device)
    tokens[4, 7] = VOCABULARY + 1
    expected = random_logits()
    expected[3, int(tokens[4, 3])] = torch.nan
    changed = expected.to(device, copy=True)
    for place, row, count in ((0, 2, 1), (3, 4, 150)):
        ends = tokens[row, :count].cpu().long()
        expected[place, ends[ends < VOCABULARY]] = FORBIDDEN
    rows = ints(ROWS, device)
    set_cells(changed, ints(PLACES, device), FORBIDDEN, rows=rows, counts=counts, tokens=tokens)
    assert changed.cpu().equal(expected)


def test_what_a_constraint_does_not_allow_is_ruled_out(device: torch.device) -> None:
    from tokenmill.kernels.logit_edits import keep_allowed

    width = -(-VOCABULARY // 32)
    draw = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31, (2, width), dtype=torch.int32, generator=draw)
    bits = torch.tensor([[n >> b & 1 for n in row for b in range(32)] for row in words.tolist()])
    expected, changed = random_logits(), random_logits().to(device)
    expected[PLACES] = expected[PLACES].masked_fill(bits[:, :VOCABULARY] == 0, -torch.inf)
    keep_allowed(changed, ints(PLACES, device), words.to(device))
    assert changed.cpu().equal(expected)
    with pytest.raises(ValueError, match="words: expected a bit for each of 3000, got 2976"):
        keep_allowed(changed, ints(PLACES, device), words[:, :-1].contiguous().to(device))
