"""Quantized checkpoints, packed here by their definitions, compute as the floats they stand for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.loader import load
from tokenmill.engine.models.int8_linear import sums_exactly
from tokenmill.engine.models.stored_weights import stored_weights
from tokenmill.engine.pipeline import Pipeline

TinyCheckpoint = Callable[..., tuple[Path, Any]]
Tensors = dict[str, torch.Tensor]
#: (float weight, its tensors) of a random linear [out, in].
Stored = tuple[torch.Tensor, Tensors]

GROUP = 16


def awq(out: int, width: int, generator: torch.Generator) -> Stored:
    """Word by word, as the format is defined: nibble n of a word holds column ORDER[n]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes = torch.randint(0, 16, (width, out), generator=generator)
    zeros = torch.randint(0, 16, (width // GROUP, out), generator=generator)
    scales = (torch.rand(width // GROUP, out, generator=generator) * 0.04 + 0.01).half()
    weight = torch.empty(out, width)
    for i in range(width):
        weight[:, i] = (codes[i] - zeros[i // GROUP]) * scales[i // GROUP].float()
    packed = {"qweight": words(codes, 4, order), "qzeros": words(zeros, 4, order)}
    return weight, packed | {"scales": scales}


def gptq(
    out: int, width: int, generator: torch.Generator, *, bits: int, moved: bool, offset: int
) -> Stored:
    groups = torch.arange(width) // GROUP
    if moved:
        groups = groups[torch.randperm(width, generator=generator)]
    codes = torch.randint(0, 2**bits, (width, out), generator=generator)
    zeros = torch.randint(1, 2**bits, (width // GROUP, out), generator=generator)
    step = 0.04 * 16 / 2**bits
    scales = (step * (torch.rand(width // GROUP, out, generator=generator) + 0.2)).half()
    weight = torch.empty(out, width)
    for i in range(width):
        weight[:, i] = (codes[i] - zeros[groups[i]]) * scales[groups[i]].float()
    order = list(range(32 // bits))
    return weight, {
        "qweight": words(codes.T, bits, order).T.contiguous(),
        "qzeros": words(zeros - offset, bits, order),
        "scales": scales,
        "g_idx": groups.int(),
    }


def words(codes: torch.Tensor, bits: int, order: list[int]) -> torch.Tensor:
    """int32 [rows, columns / n] of integers [rows, columns]."""
    packed = []
    for row in codes.tolist():
        for start in range(0, len(row), len(order)):
            word = sum(row[start + column] << bits * n for n, column in enumerate(order))
            packed.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(packed, dtype=torch.int32).view(codes.shape[0], -1)


def int8(out: int, width: int, generator: torch.Generator) -> Stored:
    codes = torch.randint(-127, 128, (out, width), generator=generator).to(torch.int8)
    scales = torch.rand(out, 1, generator=generator) * 0.003
    return codes.float() * scales, {"weight": codes, "weight_scale": scales}


def fp8(out: int, width: int, generator: torch.Generator) -> Stored:
    codes = torch.randn(out, width, generator=generator).to(torch.float8_e4m3fn)
    scales = (torch.rand(out, 1, generator=generator) * 0.3).bfloat16()
    return codes.float() * scales.float(), {"weight": codes, "weight_scale": scales}


COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
    "weights": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
}}}  # fmt: skip
FORMATS: dict[str, tuple[dict[str, Any], Callable[..., Stored]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    **{
        f"gptq-{bits}{'-moved' if moved else ''}": (
            {"quant_method": "gptq", "bits": bits, "desc_act": moved},
            lambda *a, bits=bits, moved=moved: gptq(*a, bits=bits, moved=moved, offset=1),
        )
        for bits in (4, 8)
        for moved in (False, True)
    },
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda *a: gptq(*a, bits=4, moved=False, offset=0),
    ),
    "int8": ({**COMPRESSED, "format": "int-quantized"}, int8),
    "fp8": ({**COMPRESSED, "format": "float-quantized"}, fp8),
}


@pytest.fixture(params=FORMATS)
def pair(
    request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> tuple[Path, Path]:
    """A checkpoint with quantized linears, and one with the floats that they stand for."""
    directory, _ = tiny_checkpoint("llama", num_hidden_layers=2)
    stored_config, make = FORMATS[request.param]
    generator = torch.Generator().manual_seed(0)
    quantized: Tensors = {}
    floats: Tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            floats[name] = quantized[name] = tensor
            continue
        floats[name], parts = make(*tensor.shape, generator)
        quantized |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
    twin = tmp_path / "floats"
    twin.mkdir()
    (twin / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (twin / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file(floats, twin / "model.safetensors")
    save_file(quantized, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = stored_config
    (directory / "config.json").write_text(json.dumps(config))
    return directory, twin


def test_logits_are_those_of_the_floats(pair: tuple[Path, Path]) -> None:
    prompt = [n * 37 % 320 + 5 for n in range(60)]
    told = [
        Pipeline(str(directory), device="cpu", token_budget=32)(
            [prompt], max_tokens=8, prompt_logprobs=0, logprobs=4
        )[0]
        for directory in pair
    ]
    assert told[0].token_ids == told[1].token_ids
    ours, theirs = ([*t.prompt_logprobs, *t.logprobs] for t in told)
    for row, want in zip(ours, theirs, strict=True):
        assert row.logprob == pytest.approx(want.logprob, abs=2e-4)
    assert min(row.logprob for row in theirs) < max(row.logprob for row in theirs) - 1


def named(**tensors: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((f"a.{name}", tensor) for name, tensor in tensors.items())


def test_a_linear_that_lacks_a_part_is_named() -> None:
    stored = stored_weights({"quantization_config": {"quant_method": "awq"}})
    assert stored is not None
    word = torch.zeros(16, 1, dtype=torch.int32)
    with pytest.raises(UnsupportedModel, match=r"^a lacks scales; pull"):
        list(stored.floats(named(qweight=word, qzeros=word)))
    odd = torch.ones(2, 3, dtype=torch.half)
    with pytest.raises(UnsupportedModel, match=r"^the parts of a do not fit each other: qweight"):
        list(stored.floats(named(qweight=word, qzeros=word, scales=odd)))


def test_a_linear_without_groups_is_named() -> None:
    stored = stored_weights({"quantization_config": {"quant_method": "awq"}})
    assert stored is not None
    word, none = torch.zeros(16, 1, dtype=torch.int32), torch.zeros(0, 1, dtype=torch.int32)
    parts = named(qweight=word, qzeros=none, scales=torch.zeros(0, 8))
    with pytest.raises(UnsupportedModel, match=r"^the parts of a do not fit each other: qweight"):
        list(stored.floats(parts))


@pytest.mark.parametrize(
    "config",
    [
        "awq",
        ["awq"],
        4,
        {**COMPRESSED, "format": "int-quantized", "config_groups": [{}]},
        {**COMPRESSED, "format": "int-quantized", "config_groups": {"a": 1}},
        {**COMPRESSED, "format": "int-quantized", "config_groups": {"a": {"weights": [8]}}},
    ],
    ids=str,
)
def test_a_malformed_config_is_refused(config: object) -> None:
    with pytest.raises(UnsupportedModel, match=r"quantization_config has a wrong value: .*; pull"):
        stored_weights({"quantization_config": config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method must be one of awq, gptq, .* got 'aqlm'"),
        ({"quant_method": "awq", "version": "gemv"}, "awq: version must be 'gemm', got 'gemv'"),
        ({"quant_method": "gptq", "bits": 3}, "gptq: bits must be 4 or 8, got 3; choose"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "format must be 'int-quantized' or .* got 'pack-quantized'",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        stored_weights({"quantization_config": config})


@pytest.mark.skipif(not sums_exactly(), reason="this processor adds int8 inexactly")
@pytest.mark.parametrize("pair", ["awq"], indirect=True)
def test_int8_linears_of_a_quantized_checkpoint(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The one is read, then the other is made of it; the log says so."""
    model = load(str(pair[0]), device="cpu", quantization="int8")
    assert caplog.messages == ["weights stored as awq, 4 bits are held as int8"]
    assert model.stored_as == "awq, 4 bits"
    assert not model.weights.lm_head.weight.numel()  # nothing plain is kept
