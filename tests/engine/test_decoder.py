"""The decoder against transformers: the same logits, whole and chunked, for every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import load
from tokenmill.engine.models.decoder import Decoder
from tokenmill.producer.params import SamplingParams

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-3.1-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
Checkpoint = Callable[..., tuple[Path, Any]]


def collect_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every row of logits that the engine samples from, in order."""
    rows: list[torch.Tensor] = []
    made = Decoder.logits

    def recording(self: Decoder, *args: Any) -> torch.Tensor:
        logits = made(self, *args)
        rows.extend(logits.clone())
        return logits

    monkeypatch.setattr(Decoder, "logits", recording)
    return rows


@pytest.mark.parametrize("budget", [1, 7, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(
    name: str, budget: int, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked at any budget, within 2e-4 of transformers computing the whole at once."""
    family, overrides = FAMILIES[name]
    directory, reference = tiny_checkpoint(family, **overrides)
    model = load(str(directory), device="cpu")
    config = EngineConfig(token_budget=budget, max_num_seqs=1, block_size=4)
    engine = Engine(model, config)
    prompt = torch.randint(3, 331, (90,), generator=torch.manual_seed(1)).tolist()
    rows = collect_logits(engine, monkeypatch)
    engine.add("a", prompt, SamplingParams(max_tokens=8, ignore_eos=True), seed=0)
    output = [t for _ in range(200) if engine.has_work for o in engine.step() for t in o.token_ids]
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    assert len(output) == 8
    assert (torch.stack(rows) - expected).abs().max() < 2e-4
    assert expected.abs().max() > 0.5, "a flat model proves nothing"


def test_a_mixed_batch_gives_each_sequence_its_own_tokens(tiny_checkpoint: Checkpoint) -> None:
    """Eight sequences of mixed lengths in one engine: the greedy tokens of transformers."""
    directory, reference = tiny_checkpoint("llama")
    engine = Engine(load(str(directory), device="cpu"), EngineConfig(token_budget=24, block_size=4))
    generator = torch.manual_seed(2)
    prompts = [
        torch.randint(3, 331, (n,), generator=generator).tolist()
        for n in (1, 2, 5, 17, 33, 48, 3, 9)
    ]
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=32, ignore_eos=True)
        engine.add(str(number), prompt, params, seed=0)
    outputs: dict[str, list[int]] = {str(n): [] for n in range(8)}
    while engine.has_work:
        for output in engine.step():
            outputs[output.seq_id] += output.token_ids
    engine.check_integrity()
    for number, prompt in enumerate(prompts):
        whole = torch.tensor([prompt + outputs[str(number)]])
        with torch.inference_mode():
            logits = reference(whole).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == outputs[str(number)]
