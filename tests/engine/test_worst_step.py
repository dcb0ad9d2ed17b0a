"""What is left for a KV cache: counted from a step that is really run, and refused in words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.errors import OutOfMemory
from tokenmill.engine.kv_cache import CPU_KV_BYTES
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.messages import CacheSize
from tokenmill.engine.models.decoder import Decoder
from tokenmill.engine.worst_step import RESERVE, Most, kv_memory

SIZE = CacheSize(2, 16, 256, torch.float32)


@dataclass
class Device:
    """A device of `total` bytes, `unused` of them free, whose largest step takes `step`."""

    total: int
    unused: int
    step: int

    def free(self) -> tuple[int, int]:
        return self.unused, self.total

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        found: list[int] = []
        yield found
        found.append(self.step)


@pytest.fixture
def model(tiny_checkpoint: Callable[..., tuple[Path, Any]]) -> LoadedModel:
    return load(str(tiny_checkpoint("qwen3")[0]), device="cpu")


def test_the_cache_gets_what_the_largest_step_leaves(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    forward = Decoder.forward

    def spy(self: Decoder, batch: Any, cache: Any) -> torch.Tensor:
        steps.append((len(batch.input_ids), batch.context_lens.tolist()))
        return forward(self, batch, cache)

    monkeypatch.setattr(Decoder, "forward", spy)
    device = Device(total=10_000, unused=7_000, step=2_000)
    assert kv_memory(model, Most(40, 4, 256), SIZE, device) == 5_000 - int(RESERVE * 10_000)
    left = kv_memory(model, Most(40, 4, 256), SIZE, device, kept=300, num_pools=2)
    assert left == 2_700 - int(RESERVE * 10_000)
    assert steps[:1] == [(40, [256, 13, 13, 13])]  # all tokens, all sequences, one at the end


def test_a_model_that_leaves_nothing_is_refused_with_the_numbers(model: LoadedModel) -> None:
    device = Device(total=80 << 30, unused=4 << 30, step=1 << 30)
    taken = r"4 sequences takes 1\.0 GiB of 4\.0 GiB that are free of 80\.0 GiB; lower --token-bud"
    with pytest.raises(OutOfMemory, match=taken) as refused:
        kv_memory(model, Most(40, 4, 256), SIZE, device)
    assert str(refused.value).startswith(f"{model.name} leaves no room for a KV cache")


def test_a_step_that_does_not_fit_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(Decoder, "forward", fail)
    with pytest.raises(OutOfMemory, match="does not fit: tried to allocate 9 GiB; lower"):
        kv_memory(model, Most(40, 4, 256), SIZE, Device(10, 10, 1))


def test_on_a_cpu_no_step_is_run(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Decoder, "forward")
    assert kv_memory(model, Most(40, 4, 256), SIZE) == CPU_KV_BYTES
