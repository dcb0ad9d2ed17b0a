"""keep_likely against the definition by sorting, at every size of head and for tied logits."""

from typing import Any

import pytest
import torch

from tokenmill.engine import filters
from tokenmill.engine.filters import keep_likely
from tokenmill.engine.sequence import Sequence
from tokenmill.kernels import cpu_ops
from tokenmill.producer.params import SamplingParams

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -30.0]


def make_sequence(**sampling: Any) -> Sequence:
    params = SamplingParams(temperature=1.0, **sampling)
    return Sequence(
        seq_id="a", token_ids=[1], num_prompt_tokens=1, params=params, seed=0, max_num_tokens=9
    )


def by_sorting(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """What top_k, then top_p, and min_p keep of one row, in double precision."""
    order = logits.double().argsort(descending=True)[: params.top_k or len(logits)]
    probabilities = logits.double()[order].softmax(0)
    kept: set[int] = set()
    before = 0.0
    for token, probability in zip(order.tolist(), probabilities.tolist(), strict=True):
        if (not kept or before < params.top_p) and probability >= params.min_p * probabilities[0]:
            kept.add(token)
        before += probability
    return kept


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.75}, [0, 1]),
        ({"min_p": 0.3}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.99}, [0, 1, 2]),
        ({"top_k": 2, "top_p": 0.7}, [0]),
    ],
    ids=str,
)
def test_filters_keep_what_they_say(sampling: dict[str, Any], kept: list[int]) -> None:
    left = keep_likely(torch.tensor([LOGITS]), [make_sequence(**sampling)])[0]
    assert left.isfinite().nonzero().flatten().tolist() == kept
    assert left[kept].tolist() == [LOGITS[n] for n in kept]


@pytest.mark.parametrize("heads", [None, (1,), (2, 9), (7,), (64,), (64, 128), (1000,)], ids=str)
def test_what_sorting_gives(heads: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled form, where there is one, and by torch's operations with any heads."""
    if heads is None:
        heads = ()
    else:
        monkeypatch.setattr(cpu_ops, "can_filter", lambda _logits: False)
        monkeypatch.setattr(filters, "HEADS", heads)
    torch.manual_seed(sum(heads))
    generator = torch.Generator().manual_seed(sum(heads))
    seqs = [
        make_sequence(
            top_k=top_k, top_p=top_p, min_p=0.05 if (top_k, top_p) == (40, 0.9) else min_p
        )
        for top_k in (0, 1, 5, 40, 500)
        for top_p in (1.0, 0.9, 0.3, 0.01)
        for min_p in (0.0, 0.2)
    ]
    for width in (0.1, 1.0, 4.0):
        logits = torch.randn(len(seqs), 300, generator=generator) * width
        want = [by_sorting(row, seq.params) for row, seq in zip(logits, seqs, strict=True)]
        left = keep_likely(logits.clone(), seqs)
        for row, seq, kept, expected in zip(logits, seqs, left, want, strict=True):
            assert set(kept.isfinite().nonzero().flatten().tolist()) == expected, seq.params
            assert torch.equal(kept[list(expected)], row[list(expected)])


def test_what_ties_with_the_last_one_kept_is_kept() -> None:
    left = keep_likely(torch.tensor([[0.0, 3.0, 1.0, 1.0]]), [make_sequence(top_k=2)])
    assert left.isfinite().tolist() == [[False, True, True, True]]
