"""What the KV cache holds: its type, how much of it fits, and what the answers are then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine import executor, kv_cache
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.kv_cache import choose_kv_cache_dtype
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.messages import CacheSize, decode, encode
from tokenmill.engine.sampler import sample
from tokenmill.engine.start import start_engine
from tokenmill.kernels import cpu_ops, ops
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TinyCheckpoint = Callable[..., tuple[Path, Any]]


@pytest.fixture(params=[16, 12], ids=["compiled", "torch"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> LoadedModel:
    """One whose heads compiled attention takes, and one whose it does not."""
    directory, _ = tiny_checkpoint("mistral", head_dim=request.param, sliding_window=None)
    return load(str(directory), device="cpu")


def engine_of(model: LoadedModel, **config: Any) -> Engine:
    return Engine(model, EngineConfig(token_budget=32, max_num_seqs=4, block_size=16, **config))


def logits_of(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, **config: Any) -> torch.Tensor:
    """Of the tokens that three prompts are answered with, in the order of the steps."""
    seen = []

    def spy(rows: torch.Tensor, *rest: Any) -> Any:
        seen.append(rows.clone())
        return sample(rows, *rest)

    monkeypatch.setattr(executor, "sample", spy)
    engine = engine_of(model, **config)
    for name, length in (("a", 70), ("b", 9), ("c", 40)):
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        engine.add(name, [(7 * n) % 300 + 5 for n in range(length)], params, seed=0)
    while engine.has_work:
        engine.step()
    return torch.cat(seen)


def test_answers_are_those_of_rounded_keys_and_values(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of float32 that is rounded after every write gives the same bits."""
    half = logits_of(model, monkeypatch, kv_cache_dtype="bfloat16")
    plain = logits_of(model, monkeypatch, kv_cache_dtype="float32")
    store = ops.rope_store_kv

    def rounding(*given: torch.Tensor) -> torch.Tensor:
        q = store(*given)
        for cache in given[-2:]:
            cache.copy_(cache.bfloat16())
        return q

    monkeypatch.setattr(ops, "rope_store_kv", rounding)
    monkeypatch.setattr(cpu_ops, "has_programs", lambda _: False)  # which would not call that
    rounded = logits_of(model, monkeypatch, kv_cache_dtype="float32")
    assert torch.equal(half, rounded)
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.05)


def test_a_bfloat16_cache_has_twice_the_blocks(model: LoadedModel) -> None:
    memory = 20 * 16 * model.spec.kv_token_elements * 4
    counts = [
        engine_of(model, kv_cache_memory=memory, kv_cache_dtype=name).stats().num_blocks
        for name in ("auto", "float32", "bfloat16")
    ]
    assert counts == [20, 20, 40]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "quantization", "expected"),
    [
        ("auto", CPU, torch.float32, "none", torch.float32),
        ("auto", CPU, torch.float32, "int8", torch.bfloat16),
        ("float32", CPU, torch.float32, "int8", torch.float32),
        ("bfloat16", CPU, torch.float32, "none", torch.bfloat16),
        ("auto", CPU, torch.float16, "none", torch.float16),
        ("auto", GPU, torch.bfloat16, "fp8", torch.bfloat16),
        ("bfloat16", GPU, torch.bfloat16, "none", torch.bfloat16),
        ("auto", GPU, torch.float32, "none", torch.float32),
        ("bfloat16", GPU, torch.float32, "none", torch.bfloat16),
        ("float16", GPU, torch.float16, "none", torch.float16),
        ("fp8", GPU, torch.bfloat16, "fp8", torch.float8_e4m3fn),
    ],
)
def test_choice(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_cache, "fp8_capability", lambda _: (8, 9))
    assert choose_kv_cache_dtype(name, device, dtype, quantization) == expected


@pytest.mark.parametrize(
    ("name", "device", "dtype", "says"),
    [
        ("float32", GPU, torch.bfloat16, "auto for a model in bfloat16, whose cache is bfloat16"),
        ("float32", CPU, torch.bfloat16, "auto for a model in bfloat16, whose cache is bfloat16"),
        ("float16", CPU, torch.float32, "auto for a model in float32, whose cache is float32"),
        ("fp8", CPU, torch.float32, r"fp8 on a GPU .* 8.9 or more, got 'fp8 on cpu \(.* none\)'"),
        ("fp8", GPU, torch.bfloat16, r"8.9 or more, got 'fp8 on cuda \(compute capability 8.6\)'"),
        ("int4", CPU, torch.float32, "auto, float32, bfloat16, float16, fp8"),
    ],
)
def test_refusals(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == GPU:
        monkeypatch.setattr(kv_cache, "fp8_capability", lambda _: (8, 6))
    with pytest.raises(InvalidRequest, match=says):
        choose_kv_cache_dtype(name, device, dtype)


def test_the_configuration_knows_the_names() -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_dtype must be auto, float32, bfloat16"):
        EngineConfig(kv_cache_dtype="int4")


def test_what_cannot_be_had_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_dtype must be fp8 on a GPU"):
        start_engine("nowhere", EngineConfig(kv_cache_dtype="fp8"), device="cpu")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str
)
def test_other_ranks_are_told_of_it(dtype: torch.dtype) -> None:
    size = CacheSize(7, 16, 100, dtype)
    assert decode(encode(size)) == size
