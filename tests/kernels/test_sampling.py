"""The sampling kernel against the engine's sampler: the same noise, the same tokens."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tokenmill.engine import sampler
from tokenmill.engine.filters import keep_likely
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.params import SamplingParams

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1e-5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 2.0, "top_k": 100_000},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 1e-9},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
]


def make_sequence(seed: int, tokens: int, sampling: dict[str, Any]) -> Sequence:
    return Sequence(
        seq_id="a",
        token_ids=[1] * tokens,
        num_prompt_tokens=1,
        params=SamplingParams(**sampling),
        seed=seed,
        max_num_tokens=1000,
    )


def make_batch(each: int) -> list[Sequence]:
    """Every sampling, with `each` seeds of up to 64 bits and positions."""
    seeds = torch.Generator().manual_seed(1)
    return [
        make_sequence(int(torch.randint(2**62, (), generator=seeds)) * 4 + 3, 1 + n, sampling)
        for sampling in SAMPLINGS
        for n in range(each)
    ]


def on_device(
    logits: torch.Tensor, seqs: list[Sequence], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, logprobs, _ = sampler.draw_by_kernel(logits.to(device), seqs)
    return tokens.cpu(), logprobs.cpu()


def random_logits(rows: int, vocabulary: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))


@pytest.mark.parametrize(
    "vocabulary", [31, *(pytest.param(v, marks=pytest.mark.slow) for v in (1, 333, 9000))]
)
def test_tokens_and_logprobs_are_the_samplers(
    device: torch.device, poisoned: None, vocabulary: int
) -> None:
    seqs = make_batch(2)
    logits = random_logits(len(seqs), vocabulary)
    tokens, logprobs = on_device(logits, seqs, device)
    expected = logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
    assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == sampler.sample(logits.clone(), seqs, ())[0]


@pytest.fixture
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is several parts, though it is short enough for an interpreter."""
    from tokenmill.kernels import sampling

    monkeypatch.setattr(sampling, "PART", 32)


@pytest.mark.usefixtures("_short_parts", "poisoned")
def test_parts_are_merged(device: torch.device) -> None:
    """Of 16-bit logits, from resident parameters that lie in another order."""
    from tokenmill.kernels.sampling import sample

    far_apart = {"temperature": 0.05, "top_k": 60}  # no level has as many
    kinds = [*(SAMPLINGS[n] for n in (0, 2, 7, 9, 11)), far_apart]
    seqs = [make_sequence(n, 1 + n, kind) for n, kind in enumerate(kinds)]
    logits = random_logits(len(seqs), 100).bfloat16()
    logits[0, [70, 99]] = 20.0  # the first of equals, in another part than the second
    order = torch.tensor([4, 6, 1, 0, 3, 5], dtype=torch.int32)

    def resident(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        column = torch.full((7,), 1, dtype=dtype)
        column[order.long()] = torch.tensor(values, dtype=dtype)
        return column.to(device)

    params = [seq.params for seq in seqs]
    tokens, logprobs, totals = sample(
        logits.to(device),
        rows=order.to(device),
        temperature=resident([p.temperature for p in params], torch.float32),
        top_k=resident([p.top_k for p in params], torch.int32),
        top_p=resident([p.top_p for p in params], torch.float32),
        min_p=resident([p.min_p for p in params], torch.float32),
        seeds=resident([seq.seed for seq in seqs], torch.int64),
        positions=torch.tensor([s.num_tokens for s in seqs], dtype=torch.int32, device=device),
    )
    expected, _ = sampler.sample(logits.float(), seqs, ())
    assert tokens.tolist() == expected
    assert expected[0] == 70
    told = logits.float().log_softmax(dim=-1).gather(1, tokens.cpu()[:, None]).squeeze(1)
    assert_close(logprobs.cpu(), told, rtol=1e-5, atol=1e-5)
    assert_close(totals.cpu(), logits.float().logsumexp(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_short_parts", "poisoned")
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [
        (0, 0.8),
        (45, 0.9),
        (2, 0.9),
        pytest.param(9, 1.0, marks=pytest.mark.slow),
        pytest.param(110, 1.0, marks=pytest.mark.slow),
    ],
)
def test_thresholds_are_those_of_a_sort(device: torch.device, top_k: int, top_p: float) -> None:
    """The least bits down to which as many lie, or as much; rows that ask for nothing have -1."""
    from tokenmill.kernels.thresholds import find_thresholds

    logits = 2 * random_logits(3, 120)
    logits[:, 100:] -= 30
    heat = torch.tensor([1.0, 0.0, 2.5])
    depths = ((logits.amax(dim=1, keepdim=True) - logits) / heat.clamp(min=1e-6)[:, None]).sort()[0]
    count = top_k or 120
    reached = depths[:, :count].neg().exp().cumsum(dim=1)
    places = (
        (reached < top_p * reached[:, -1:]).sum(dim=1) if top_p < 1 else torch.tensor(count - 1)
    )
    expected = depths.gather(1, places.expand(3)[:, None]).squeeze(1).view(torch.int32)
    expected[1] = -1
    last = torch.full((3,), -1, dtype=torch.int32, device=device)
    find_thresholds(
        logits.to(device),
        torch.stack([logits[:, n : n + 32].amax(dim=1) for n in range(0, 120, 32)], dim=1).to(
            device
        ),
        torch.arange(3, dtype=torch.int32, device=device),
        temperature=heat.to(device),
        top_k=torch.full((3,), top_k, dtype=torch.int32, device=device),
        top_p=torch.full((3,), top_p, device=device),
        last=last,
        part=32,
    )
    assert last.tolist() == expected.tolist()


@pytest.mark.usefixtures("_short_parts", "poisoned")
def test_a_part_far_below_the_highest_is_drawn_from_by_the_highest_noise(
    device: torch.device,
) -> None:
    """Of 200,000 tokens' noise the one that makes most of a low logit."""
    seqs = [make_sequence(seed, 3, {"temperature": 1.0}) for seed in range(6000)]
    noise = sampler.gumbel_noise(seqs, 96, torch.device("cpu"))
    gain = noise[:, 64:] - noise[:, :1]
    seed, token = divmod(int(gain.argmax()), 32)
    most = float(gain.max())
    assert 12 < most < 19.5
    logits = torch.full((2, 96), -200.0)
    logits[:, 0] = 0.0
    logits[:, 64 + token] = torch.tensor([0.001, -0.001]) - most
    assert on_device(logits, [seqs[seed]] * 2, device)[0].tolist() == [64 + token, 0]


@pytest.mark.usefixtures("_short_parts", "poisoned")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_give_no_token(device: torch.device, value: float) -> None:
    """And take none from their neighbours; a single infinite one takes the row, but not -inf."""
    kinds = [SAMPLINGS[n] for n in (0, 2, 7, 11)]
    seqs = [make_sequence(n, 1 + n, kind) for n, kind in enumerate(kinds * 3)]
    logits = random_logits(len(seqs), 70)
    logits[:4] = value
    logits[4:8, 65] = value
    expected = sampler.sample(logits.clone(), seqs, ())[0]
    assert expected[:4] == [sampler.NO_TOKEN] * 4
    assert (sampler.NO_TOKEN in expected[4:8]) == (value != -math.inf)
    assert sampler.NO_TOKEN not in expected[8:]
    tokens, logprobs = on_device(logits, seqs, device)
    assert tokens.tolist() == expected
    assert logprobs.isnan().tolist() == [token == sampler.NO_TOKEN for token in expected]


@pytest.mark.parametrize(
    ("sampling", "draws"),
    [
        ({"top_k": 2}, 12),
        ({"min_p": 0.97}, 40),
        pytest.param({"top_p": 0.5}, 40, marks=pytest.mark.slow),
        pytest.param({"top_k": 5}, 40, marks=pytest.mark.slow),
        pytest.param({"top_k": 5, "top_p": 0.5}, 40, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_that_tie_with_the_last_one_are_kept(
    device: torch.device, sampling: dict[str, Any], draws: int
) -> None:
    """Drawn from often enough, all that is kept is seen, and nothing else."""
    row = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, -torch.inf, 0.5, -3.0])
    seqs = [make_sequence(seed, 3, {"temperature": 50.0, **sampling}) for seed in range(draws)]
    tokens, _ = on_device(row.repeat(draws, 1), seqs, device)
    kept = keep_likely((row[None] - 2.0) / 50.0, seqs[:1])[0]
    assert sorted(set(tokens.tolist())) == kept.isfinite().nonzero().flatten().tolist()


def test_the_first_of_equal_logits_is_the_greedy_one(device: torch.device) -> None:
    logits = torch.zeros(1, 5000)
    logits[0, [4900, 77, 4096]] = 1.0
    tokens, _ = on_device(logits, [make_sequence(0, 1, {"temperature": 0.0})], device)
    assert tokens.tolist() == [77]


def test_columns_of_another_type_are_refused(device: torch.device) -> None:
    from tokenmill.kernels.sampling import sample

    column = torch.ones(2, device=device)
    whole = torch.ones(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^top_k: expected dtype torch.int32, got torch.int64"):
        sample(
            torch.ones(2, 3, device=device),
            temperature=column,
            top_k=whole,
            top_p=column,
            min_p=column,
            seeds=whole,
            positions=whole,
        )
