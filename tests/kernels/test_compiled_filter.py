"""`compiled_filter`: what is kept, whatever the size of the vocabulary and the values are."""

import pytest
import torch

from tokenmill.kernels import compiler

if not compiler.is_available():
    pytest.skip("needs numba and fused multiply-add", allow_module_level=True)

from tokenmill.kernels.compiled_filter import can_filter, keep_likely


def kept(logits: torch.Tensor, top_k: float, top_p: float, min_p: float) -> torch.Tensor:
    left = logits.clone()
    keep_likely(left, [(top_k, top_p, min_p)] * len(logits))
    assert torch.equal(left[left.isfinite()], logits[left.isfinite()])
    return left.isfinite()


@pytest.mark.parametrize("vocabulary", [16, 17, 63, 64, 65, 1000, 50257])
def test_top_k_of_any_vocabulary(vocabulary: int) -> None:
    logits = 3 * torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(3))
    for top_k in (1, 2, vocabulary // 2, vocabulary - 1):
        want = logits >= logits.topk(top_k).values[:, -1:]
        assert torch.equal(kept(logits, top_k, 1.0, 0.0), want)
    assert kept(logits, vocabulary, 1.0, 0.0).all()


@pytest.mark.parametrize("vocabulary", [17, 1000, 50257])
@pytest.mark.parametrize("width", [0.01, 1.0, 8.0])
def test_the_mass_of_top_p(vocabulary: int, width: float) -> None:
    """What is kept has that much, and without its least likely token less."""
    logits = width * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(4))
    probabilities = logits.double().softmax(dim=-1)
    for top_p in (0.05, 0.5, 0.95, 0.9999):
        left = kept(logits, vocabulary, top_p, 0.0)
        mass = probabilities.where(left, 0).sum(dim=-1)
        least = probabilities.where(left, 2).amin(dim=-1)
        assert (mass >= top_p - 1e-5).all()
        assert (mass - least < top_p + 1e-5).all()
        assert (probabilities.where(~left, 0).amax(dim=-1) <= least).all()


def test_min_p_is_of_the_likeliest() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.06, 0.04] + [0.2 / 12] * 12])
    assert kept(probabilities.log(), 16, 1.0, 0.1).tolist()[0] == [True] * 3 + [False] * 13


def test_what_was_left_out_before_stays_so() -> None:
    logits = torch.zeros(2, 40)
    logits[:, ::2] = -torch.inf
    assert torch.equal(kept(logits, 40, 0.9999, 0.0), logits.isfinite())
    logits[:, 1] = 5.0
    assert kept(logits, 1, 0.5, 0.5).nonzero().tolist() == [[0, 1], [1, 1]]


def test_logits_beyond_all_floats_of_exp() -> None:
    """Far below the likeliest they are 0 and tie; none of them can be drawn."""
    logits = torch.linspace(-1e30, 0, 48)[None]
    assert kept(logits, 1, 1.0, 0.0).nonzero().tolist() == [[0, 47]]
    assert kept(logits, 48, 0.5, 0.0).nonzero().tolist() == [[0, 47]]


def test_rows_that_are_no_numbers_end() -> None:
    for value in (torch.nan, -torch.inf, torch.inf):
        keep_likely(torch.full((3, 100), value), [(5, 0.9, 0.1)] * 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_batch(threads: int) -> None:
    logits = torch.randn(9, 1001, generator=torch.Generator().manual_seed(5))
    params = [(5.0 + n, 0.1 * (n + 1), 0.01 * n) for n in range(9)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = logits.clone()
        keep_likely(together, params)
        for row, param in enumerate(params):
            alone = logits[row : row + 1].clone()
            keep_likely(alone, [param])
            assert torch.equal(alone[0], together[row])
    finally:
        torch.set_num_threads(before)


def test_what_it_takes() -> None:
    keep_likely(torch.zeros(0, 16), [])
    assert not can_filter(torch.zeros(2, 15))
    assert not can_filter(torch.zeros(16, 2).T)
    assert not can_filter(torch.zeros(2, 16, dtype=torch.float64))
