"""Log probabilities equal transformers', of the output and of the prompt, however it is chunked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine import logprobs
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.producer.logprobs import TokenLogprobs
from tokenmill.producer.params import SamplingParams

TOLERANCE = 1e-4
PROMPTS = [[7, 9, 200, 31, 5], [3] * 30 + [8, 250], [11]]


@pytest.fixture
def both(tiny_checkpoint: Callable[..., tuple[Path, Any]]) -> tuple[LoadedModel, Any]:
    directory, theirs = tiny_checkpoint("qwen3", head_dim=16)
    return load(str(directory), device="cpu"), theirs


def run(
    engine: Engine, prompts: list[list[int]], **sampling: Any
) -> list[tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]]:
    """Tokens, their log probabilities, and those of the prompt."""
    got: list[tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]] = [
        ([], [], []) for _ in prompts
    ]
    for number, prompt in enumerate(prompts):
        params = SamplingParams(ignore_eos=True, **sampling)
        engine.add(str(number), prompt, params, seed=number)
    while engine.has_work:
        for output in engine.step():
            tokens, told, of_prompt = got[int(output.seq_id)]
            tokens += output.token_ids
            told += output.logprobs
            of_prompt += output.prompt_logprobs
    engine.check_integrity()
    return got


def assert_equals(told: list[TokenLogprobs], ids: list[int], log_softmax: torch.Tensor) -> None:
    """`told` against rows [R, V] of transformers' log probabilities for the tokens `ids`."""
    assert [row.token_id for row in told] == ids
    for row, want in zip(told, log_softmax, strict=True):
        assert row.logprob == pytest.approx(want[row.token_id].item(), abs=TOLERANCE)
        best = want.topk(len(row.top)).values.tolist()
        assert [value for _, value in row.top] == pytest.approx(best, abs=TOLERANCE)
        values = [want[token].item() for token, _ in row.top]
        assert [value for _, value in row.top] == pytest.approx(values, abs=TOLERANCE)


@pytest.mark.parametrize("budget", [3, 64])
def test_logprobs_equal_transformers(
    both: tuple[LoadedModel, Any], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled with penalties: what is told is the model's own distribution all the same."""
    ours, theirs = both
    monkeypatch.setattr(logprobs, "SLICE_ELEMENTS", 1000)  # three rows of logits at a time
    engine = Engine(ours, EngineConfig(token_budget=budget, max_num_seqs=3, block_size=4))
    sampling: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 1.7, "top_k": 20}
    got = run(engine, PROMPTS, max_tokens=8, logprobs=5, prompt_logprobs=2, **sampling)
    for prompt, (tokens, told, of_prompt) in zip(PROMPTS, got, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + tokens])).logits[0]
        expected = logits.log_softmax(-1)
        size = len(prompt)
        assert_equals(of_prompt, prompt[1:], expected[: size - 1])
        assert_equals(told, tokens, expected[size - 1 : -1])
        assert all(len(row.top) == 5 for row in told)


def test_only_who_asks_is_told(both: tuple[LoadedModel, Any]) -> None:
    engine = Engine(both[0], EngineConfig(token_budget=64))
    ((tokens, told, of_prompt),) = run(engine, [[4, 5, 6]], max_tokens=3)
    assert (len(tokens), told, of_prompt) == (3, [], [])


def test_a_recomputed_prompt_is_told_once(both: tuple[LoadedModel, Any]) -> None:
    """A cache too small for four sequences at once: some are recomputed from the start."""
    block_bytes = 2 * 3 * 2 * 16 * 4 * 4  # keys and values, layers, heads, head_dim, tokens, bytes
    config = EngineConfig(
        token_budget=16, max_num_seqs=4, block_size=4, kv_cache_memory=13 * block_bytes
    )
    engine = Engine(both[0], config)
    engine.scheduler.output_lengths.record(1)  # admit all at once
    prompts = [[number + 3, 9, 31, 4, 77, 12, 60] for number in range(4)]
    got = run(engine, prompts, max_tokens=20, prompt_logprobs=0)
    assert engine.scheduler.num_preemptions > 0
    for prompt, (_, _, of_prompt) in zip(prompts, got, strict=True):
        assert [row.token_id for row in of_prompt] == prompt[1:]


def test_a_resumed_sequence_is_not_told_of_its_prompt_again(both: tuple[LoadedModel, Any]) -> None:
    engine = Engine(both[0], EngineConfig(token_budget=64))
    params = SamplingParams(max_tokens=4, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    engine.add("a", [4, 5, 6], params, output_ids=[7], seed=0)
    outputs = [output for _ in range(3) for output in engine.step()]
    assert [len(output.logprobs) for output in outputs] == [1, 1, 1]
    assert not any(output.prompt_logprobs for output in outputs)


def test_a_row_alone_has_the_log_probabilities_that_it_has_among_others() -> None:
    """Of a long row alone, torch divides the sum among its threads."""
    logits = 3 * torch.randn(60, 49_152, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = logprobs.logprobs_of(logits, [7] * 60, [2] * 60)
        alone = [logprobs.logprobs_of(row[None], [7], [2])[0] for row in logits]
    finally:
        torch.set_num_threads(before)
    assert together == alone
