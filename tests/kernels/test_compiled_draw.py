"""`compiled_draw`: the tokens that torch's own operations draw."""

import pytest
import torch

from tokenmill.engine.sampler import gumbel_noise, noise_key
from tokenmill.engine.sequence import Sequence
from tokenmill.kernels import compiler
from tokenmill.producer.params import SamplingParams

if not compiler.is_available():
    pytest.skip("needs numba and fused multiply-add", allow_module_level=True)

from tokenmill.kernels.compiled_draw import can_draw, draw


def sequences(count: int) -> list[Sequence]:
    return [
        Sequence(
            seq_id="a",
            token_ids=[1] * (5 + number % 7),
            num_prompt_tokens=5,
            params=SamplingParams(),
            seed=977 * number**5,
            max_num_tokens=100,
        )
        for number in range(count)
    ]


def keys(seqs: list[Sequence]) -> list[int]:
    return [noise_key(seq.seed, seq.num_tokens) for seq in seqs]


@pytest.mark.parametrize("vocabulary", [16, 17, 31, 50257])
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_tokens(vocabulary: int, scale: float) -> None:
    """A sum of the highest two may be closer than logarithms are: then either is right."""
    logits = scale * torch.randn(30, vocabulary, generator=torch.Generator().manual_seed(1))
    logits[:, 1::3] = -torch.inf  # what a filter leaves out
    seqs = sequences(30)
    sums = gumbel_noise(seqs, vocabulary, logits.device) + logits
    got = draw(logits, keys(seqs))
    most = sums.amax(dim=-1)
    torch.testing.assert_close(sums[range(30), got], most, atol=2e-5, rtol=1e-6)
    assert sum(token != want for token, want in zip(got, sums.argmax(-1), strict=True)) <= 1


def test_noise_of_every_token_can_win() -> None:
    """All logits are equal: each token is drawn as often as any other."""
    seqs = sequences(4000)
    tokens = draw(torch.zeros(4000, 20), keys(seqs))
    counts = torch.tensor([tokens.count(token) for token in range(20)])
    assert ((counts - 200) ** 2 / 200).sum().item() < 43.8  # once in a thousand, 19 degrees


def test_one_logit_left() -> None:
    logits = torch.full((5, 40), -torch.inf)
    logits[range(5), [0, 15, 16, 31, 39]] = -1e9
    assert draw(logits, keys(sequences(5))) == [0, 15, 16, 31, 39]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_batch(threads: int) -> None:
    seqs = sequences(9)
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = draw(logits, keys(seqs))
        alone = [draw(logits[n : n + 1], keys([seq]))[0] for n, seq in enumerate(seqs)]
        strided = torch.zeros(9, 1500)[:, :1000].copy_(logits)
        assert together == alone == draw(strided, keys(seqs))
    finally:
        torch.set_num_threads(before)


def test_what_it_takes() -> None:
    assert can_draw(torch.zeros(0, 16))
    assert draw(torch.zeros(0, 16), []) == []
    assert not can_draw(torch.zeros(2, 15))
    assert not can_draw(torch.zeros(16, 2).T)
    assert not can_draw(torch.zeros(2, 16, dtype=torch.float64))


def test_no_token_where_there_is_no_number() -> None:
    logits = torch.zeros(4, 33)
    logits[0] = -torch.inf
    logits[1] = torch.nan
    logits[2, 32] = 1.0
    logits[3, :32] = torch.nan
    assert [token < 0 for token in draw(logits, keys(sequences(4)))] == [True, True, False, False]
