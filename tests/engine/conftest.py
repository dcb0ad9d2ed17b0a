"""Models for the engine's tests: the real small one, and tiny random ones made here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine import executor as executor_module
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.sampler import sample
from tokenmill.engine.sources import pull, resolve

#: (sequence, its length) -> the logits that its next token was chosen from.
Logits = dict[tuple[str, int], torch.Tensor]
TINY = {
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Beside other processes a second thread makes tiny models many times as slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Logits:
    """Filled by every engine that steps; logits that differ from earlier ones fail the test."""
    logits: Logits = {}

    def spy(rows: torch.Tensor, seqs: list[Any], *rest: Any) -> Any:
        for row, seq in zip(rows.clone(), seqs, strict=True):
            key = (seq.seq_id, seq.num_tokens)
            assert torch.equal(row, logits.setdefault(key, row)), f"{key}: other logits"
        return sample(rows, seqs, *rest)

    monkeypatch.setattr(executor_module, "sample", spy)
    return logits


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct from its package, float32 on the CPU."""
    pull("smollm2")
    return load("smollm2", device="cpu")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """transformers' tokenizer of the same file."""
    from transformers import AutoTokenizer

    path = resolve("smollm2")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """transformers' config of a tiny model of a family."""

    def make(family: str, **overrides: object) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(family, **(TINY | overrides))

    return make


@pytest.fixture(scope="session")
def write_checkpoint(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Write a random checkpoint of a family by transformers; returns transformers' own model."""

    def write(directory: Path, family: str, **overrides: object) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        config = tiny_config(family, **overrides)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # Larger weights than transformers starts from: the logits of a tiny model must differ.
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(
                    torch.randn_like(weight) * (0.15 if weight.dim() > 1 else 0.5)
                    + (weight.dim() == 1)
                )
        model.save_pretrained(directory)
        words = {f"w{n}": n for n in range(TINY["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(directory / "tokenizer.json"))
        return model

    return write


@pytest.fixture
def tiny_checkpoint(
    tmp_path: Path, write_checkpoint: Callable[..., Any]
) -> Callable[..., tuple[Path, Any]]:
    """A random checkpoint written by transformers: its directory, and transformers' own model."""

    def make(family: str, **overrides: object) -> tuple[Path, Any]:
        directory = tmp_path / family
        return directory, write_checkpoint(directory, family, **overrides)

    return make
