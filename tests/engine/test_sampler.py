"""Sampling: exact distributions, filters, and noise that depends on (seed, position) alone."""

import math
from collections.abc import Collection
from typing import Any

import pytest
import torch

from tokenmill.engine import sampler
from tokenmill.engine.sampler import gumbel_noise, gumbel_of, noise_key
from tokenmill.engine.sequence import Sequence
from tokenmill.kernels import cpu_ops
from tokenmill.producer.params import SamplingParams

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -30.0]


def make_sequence(seed: int = 0, tokens: int = 5, **sampling: Any) -> Sequence:
    params = SamplingParams(**sampling)
    return Sequence(
        seq_id="a",
        token_ids=[1] * tokens,
        num_prompt_tokens=5,
        params=params,
        seed=seed,
        max_num_tokens=1000,
    )


def draw(count: int, **sampling: Any) -> list[int]:
    seqs = [make_sequence(seed, **sampling) for seed in range(count)]
    return sample(torch.tensor([LOGITS] * count), seqs)


def sample(logits: torch.Tensor, seqs: list[Sequence], eos: Collection[int] = ()) -> list[int]:
    return sampler.sample(logits, seqs, eos)[0]


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    total = 0.0
    for token, probability in enumerate(probabilities):
        expected = probability * len(tokens)
        if expected < 5:
            assert tokens.count(token) <= 20
        else:
            total += (tokens.count(token) - expected) ** 2 / expected
    return total


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """Chi-square with 4 or 5 degrees of freedom: above 20.5 once in a thousand."""
    tokens = draw(20_000, temperature=temperature)
    assert chi_square(tokens, softmax([x / temperature for x in LOGITS])) < 20.5


def test_positions_are_independent_draws() -> None:
    seqs = [make_sequence(7, tokens=5 + n, temperature=1.0, max_tokens=999) for n in range(4000)]
    tokens = sample(torch.tensor([LOGITS] * len(seqs)), seqs)
    assert chi_square(tokens, softmax(LOGITS)) < 20.5


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise([make_sequence(seed) for seed in range(40)], 5000, torch.device("cpu"))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    neighbours = torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))
    assert abs(neighbours[0, 1].item()) < 0.01


def test_noise_is_finite_at_its_ends() -> None:
    """With 24 bits the largest uniform number would round to 1, and its noise be infinite."""
    ends = gumbel_of(torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert ends.tolist() == pytest.approx([-2.8117, 16.6355, 0.3665, 0.3665], abs=1e-3)


def test_a_row_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 300)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}]
    seqs = [make_sequence(seed, **kinds[seed % 3]) for seed in range(9)]
    together = sample(logits.clone(), seqs)
    alone = [sample(logits[n : n + 1].clone(), [seq]) for n, seq in enumerate(seqs)]
    assert [[token] for token in together] == alone
    assert together[0] == logits[0].argmax()


def test_keys_differ_by_seed_and_position() -> None:
    keys = {noise_key(seed, position) for seed in range(200) for position in range(200)}
    assert len(keys) == 200 * 200
    assert len({key & 0xFFFFFFFF for key in keys}) > 200 * 200 - 5


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [({"top_k": 3}, 3), ({"top_p": 0.9}, 4), ({"min_p": 0.2}, 3), ({"top_k": 3, "top_p": 0.7}, 2)],
    ids=str,
)
def test_filtered_draws_follow_the_renormalised_distribution(
    sampling: dict[str, Any], kept: int
) -> None:
    """Up to 3 degrees of freedom: above 16.3 once in a thousand."""
    tokens = draw(20_000, temperature=1.0, **sampling)
    assert set(tokens) == set(range(kept))
    assert chi_square(tokens, softmax(LOGITS[:kept])) < 16.3


def test_penalised_draws_follow_the_changed_distribution() -> None:
    sampling: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {"0": -0.5, 3: 1.5},
    }
    seqs = [make_sequence(seed, temperature=1.0, **sampling) for seed in range(20_000)]
    for seq in seqs:
        seq.token_ids += [0, 3, 3]  # after a prompt of five times token 1
    tokens = sample(torch.tensor([LOGITS] * len(seqs)), seqs)
    z0, z3 = 1.5 / 1.3 - 0.3 - 0.4, 1.5 / 1.3 - 0.6 - 0.4
    assert chi_square(tokens, softmax([z0, 1 / 1.3, 0.5, z3, -1.0, -30.0])) < 20.5


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 300) * 3
    kinds: list[dict[str, Any]] = [{"logprobs": 2}, {"temperature": 1.0, "repetition_penalty": 2.0}]
    seqs = [make_sequence(seed, top_p=0.8, **kinds[seed % 2]) for seed in range(7)]
    whole = sampler.sample(logits.clone(), seqs, ())
    monkeypatch.setattr(sampler, "SLICE_ELEMENTS", 600)
    assert sampler.sample(logits.clone(), seqs, ()) == whole


def test_memory_does_not_grow_with_the_batch() -> None:
    """With top_p, 256 rows of 65,536: what is allocated beside the logits stays below them."""
    seqs = [
        make_sequence(seed, temperature=1.0, top_p=0.95, top_k=50 * (seed % 2))
        for seed in range(256)
    ]
    logits = torch.randn(256, 1 << 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        sample(logits, seqs)
    size = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            size += event.nbytes()
            peak = max(peak, size)
    assert 0 < peak < 4 * logits.nbytes


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert draw(50, temperature=temperature) == [0] * 50


def test_ends_are_not_sampled_before_min_tokens() -> None:
    seq = make_sequence(tokens=6, min_tokens=2, stop_token_ids=[1])
    assert sample(torch.tensor([LOGITS]), [seq], {0}) == [2]
    seq.token_ids.append(2)
    assert sample(torch.tensor([LOGITS]), [seq], {0}) == [0]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_logits_that_are_no_numbers_give_no_token(
    value: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And take none from the other rows, with log probabilities or without."""
    if not compiled:
        monkeypatch.setattr(cpu_ops, "can_draw", lambda _logits: False)
        monkeypatch.setattr(cpu_ops, "can_filter", lambda _logits: False)
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 3, "logprobs": 1},
    ]
    seqs = [make_sequence(seed, **kind) for seed, kind in enumerate([*kinds, *kinds])]
    logits = torch.randn(10, 40, generator=torch.Generator().manual_seed(3))
    usual = sample(logits[5:].clone(), seqs[5:])
    logits[:5] = value
    tokens = sample(logits, seqs)
    assert tokens[:5] == [sampler.NO_TOKEN] * 5
    assert tokens[5:] == usual
