"""On a CPU the logits of a request have the same bits whatever it is computed with, and how."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from family_cases import CASES, RENAMED, rename
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.producer.params import SamplingParams

Logits = dict[tuple[str, int], torch.Tensor]
TinyCheckpoint = Callable[..., tuple[Path, Any]]
DEFAULTS: dict[str, Any] = {"token_budget": 256, "max_num_seqs": 6, "block_size": 4}


@pytest.fixture(params=["qwen3", "mistral"])
def model(
    request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint, one_thread: None
) -> LoadedModel:
    """Awkward widths, so that no kernel gets whole vectors; one with norms of heads.

    Compiled attention takes the heads of the other one.
    """
    directory, _ = tiny_checkpoint(
        request.param, hidden_size=50, num_attention_heads=5, num_key_value_heads=1,
        head_dim=12 if request.param == "qwen3" else 16,
        intermediate_size=77, max_position_embeddings=1024, sliding_window=None,
    )  # fmt: skip
    return load(str(directory), device="cpu")


def prompt_of(name: str, length: int) -> list[int]:
    return [(int(name, 36) * 31 + 37 * n) % 320 + 5 for n in range(length)]


def answer(model: LoadedModel, *names: str, temperature: float = 0.0, **config: Any) -> Engine:
    """Answer prompts of different lengths; `a` has 230 tokens, further ones fewer."""
    engine = Engine(model, EngineConfig(**(DEFAULTS | config)))
    engine.scheduler.output_lengths.record(1)  # admit all at once
    for name in names:
        params = SamplingParams(max_tokens=24, temperature=temperature, ignore_eos=True)
        length = 230 - 41 * (int(name, 36) - 10)
        engine.add(name, prompt_of(name, length), params, seed=int(name, 36))
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    return engine


@pytest.mark.parametrize(
    ("temperature", "cache"), [(0.0, "float32"), (0.0, "bfloat16"), (1.0, "float32")]
)
def test_alone_in_a_batch_in_chunks_or_preempted(
    model: LoadedModel, seen: Logits, temperature: float, cache: str
) -> None:
    settings: dict[str, Any] = {"temperature": temperature, "kv_cache_dtype": cache}
    answer(model, "a", **settings)
    assert len(seen) == 24
    for budget in (6, 7, 64, 256):
        answer(model, *"abcdef", **settings, token_budget=budget)
    answer(model, "a", **settings, token_budget=1, max_num_seqs=1)
    block_bytes = model.spec.kv_token_elements * 4 * (4 if cache == "float32" else 2)
    small = answer(model, *"abcdef", **settings, kv_cache_memory=80 * block_bytes)
    assert small.stats().num_preemptions > 0
    assert len(seen) == 6 * 24


@pytest.mark.parametrize("cache", ["float32", "bfloat16"])
def test_cached_or_not(model: LoadedModel, seen: Logits, cache: str) -> None:
    """The same prompts again, in an engine that knows their blocks, and in one that must not."""
    engine = answer(model, "a", "b", kv_cache_dtype=cache)
    for name, length in (("a", 230), ("b", 189)):
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        engine.add(name, prompt_of(name, length), params, seed=int(name, 36))
    while engine.has_work:
        engine.step()
    assert engine.stats().num_cached_tokens == 228 + 188
    answer(model, "a", "b", kv_cache_dtype=cache, prefix_caching=False, block_size=16)


#: Experts and a shared one; layer norm, biases and a parallel block..
QUICK = ("qwen2-moe", "gpt-neox")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in QUICK)]
)
def test_every_kind_of_model(
    name: str, tmp_path: Path, write_checkpoint: Callable[..., Any], seen: Logits
) -> None:
    """The cases of test_families.py, with their windows, experts, norms and caps."""
    family, overrides = CASES[name]
    write_checkpoint(tmp_path, family, **overrides)
    if name in RENAMED:
        rename(tmp_path, name)
    model = load(str(tmp_path), device="cpu")
    answer(model, "c")
    answer(model, *"cdef", token_budget=7)
    small = {"kv_cache_memory": 48 * 4 * 4 * model.spec.kv_token_elements}
    answer(model, *"cdef", token_budget=64, **small)
    assert len(seen) == 4 * 24


def test_on_two_threads(model: LoadedModel, seen: Logits) -> None:
    torch.set_num_threads(2)
    answer(model, "f")
    answer(model, *"ef", token_budget=6)
    torch.set_num_threads(1)
    answer(model, "e")
    assert len(seen) == 2 * 24


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_small_real_model_on_two_threads(smollm2: LoadedModel, seen: Logits) -> None:
    """Its matrices are large enough to be shared between threads."""
    torch.set_num_threads(2)
    answer(smollm2, "d", token_budget=256, block_size=32)
    answer(smollm2, *"cdef", token_budget=16, block_size=32)
    torch.set_num_threads(1)
    answer(smollm2, "c", token_budget=64, block_size=32)
    assert len(seen) == 4 * 24


@pytest.mark.usefixtures("one_thread")
def test_the_small_real_model(smollm2: LoadedModel, seen: Logits) -> None:
    answer(smollm2, "f", token_budget=256, block_size=32)
    answer(smollm2, *"ef", token_budget=16, block_size=32)
    assert len(seen) == 2 * 24
