"""Penalties and bias, row by row against their formulas, and across a resume."""

from typing import Any

import torch

from tokenmill.engine.penalties import apply_bias, apply_penalties
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.token_counts import TokenCounts
from tokenmill.producer.params import SamplingParams

VOCABULARY = 23


def make_sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    return Sequence(
        seq_id="a",
        token_ids=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        params=SamplingParams(**sampling),
        seed=0,
        max_num_tokens=99,
    )


def by_formula(logits: list[float], seq: Sequence) -> list[float]:
    params, prompt = seq.params, seq.token_ids[: seq.num_prompt_tokens]
    output = seq.token_ids[seq.num_prompt_tokens :]
    changed = []
    for token, logit in enumerate(logits):
        z = logit + params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            z = z / params.repetition_penalty if z > 0 else z * params.repetition_penalty
        z -= params.frequency_penalty * output.count(token)
        changed.append(z - (params.presence_penalty if token in output else 0.0))
    return changed


def test_each_row_has_its_own() -> None:
    torch.manual_seed(0)
    seqs = [
        make_sequence([1, 2, 3], [3, 4, 4, 5], repetition_penalty=1.5),
        make_sequence([1, 2, 3], [3, 4, 4, 5]),
        make_sequence([1, 2, 2, 3], [3, 4, 4, 5], presence_penalty=0.7),
        make_sequence([9], [], repetition_penalty=0.5, frequency_penalty=2.0),
        make_sequence([1], [1, 1, 7], frequency_penalty=-0.3, logit_bias={7: 2.5, "0": -100}),
    ]
    logits = torch.randn(len(seqs), VOCABULARY) * 3
    want = [by_formula(row, seq) for row, seq in zip(logits.tolist(), seqs, strict=True)]
    apply_bias(logits, seqs)
    apply_penalties(logits, seqs)
    torch.testing.assert_close(logits, torch.tensor(want))


def test_counting_as_it_comes_is_counting_at_once() -> None:
    tokens = [5, 5, 6, 7, 6, 5, 7, 8]
    step, whole = TokenCounts(3), TokenCounts(3)
    for length in range(2, len(tokens) + 1):
        step.update(tokens[:length])
    whole.update(tokens)
    assert (step.token_ids, step.counts) == (whole.token_ids, whole.counts)
    assert dict(zip(whole.token_ids, whole.counts, strict=True)) == {5: 1, 6: 1, 7: 2, 8: 1}
