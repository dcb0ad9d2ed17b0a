"""Quantized models: what cannot be is refused at the start, and what can be is near the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import load
from tokenmill.engine.models import quantization
from tokenmill.engine.models.int8_linear import sums_exactly
from tokenmill.engine.models.quantization import choose_quantization
from tokenmill.engine.models.shard import Shard
from tokenmill.engine.pipeline import Pipeline
from tokenmill.producer.errors import InvalidRequest

TinyCheckpoint = Callable[..., tuple[Path, Any]]
CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not sums_exactly(), reason="this processor adds int8 inexactly")


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("int3", CPU, torch.float32, "quantization must be one of none, int8.* got 'int3'"),
        ("int8", CPU, torch.bfloat16, "int8 on a CPU in float32.* got 'int8 on cpu in bfloat16'"),
        ("int8", torch.device("cuda"), torch.bfloat16, "got 'int8 on cuda in bfloat16'.* none"),
    ],
)
def test_refused_at_the_start(
    name: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        choose_quantization(name, device, dtype)


def test_a_processor_that_adds_inexactly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "sums_exactly", lambda: False)
    with pytest.raises(InvalidRequest, match="VNNI"):
        choose_quantization("int8", CPU, torch.float32)


def test_a_divided_model_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="int8 on 2 ranks"):
        choose_quantization("int8", CPU, torch.float32, Shard(0, 2))


def test_none_is_the_model_as_it_is() -> None:
    assert choose_quantization("none", CPU, torch.bfloat16) is None


@needs_int8
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "phi"])
def test_int8_is_near_the_model_and_does_not_depend_on_the_batch(
    tiny_checkpoint: TinyCheckpoint, family: str
) -> None:
    """`deterministic` compares the bits of logits: whole, in chunks and beside others."""
    overrides = {"num_experts": 4, "num_experts_per_tok": 4} if family == "qwen2_moe" else {}
    directory, reference = tiny_checkpoint(family, **overrides)
    model = load(str(directory), device="cpu", quantization="int8")
    engine = Engine(model, EngineConfig(token_budget=64, deterministic=True))
    assert engine.max_model_len == 256
    pipeline = Pipeline(str(directory), device="cpu", quantization="int8", token_budget=64)
    prompt = [n * 37 % 320 + 5 for n in range(40)]
    (answer,) = pipeline([prompt], max_tokens=1, prompt_logprobs=0)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for row, want in zip(answer.prompt_logprobs, expected, strict=False):
        assert row.logprob == pytest.approx(want[row.token_id].item(), abs=1.0)
