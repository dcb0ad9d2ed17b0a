"""Quantized checkpoints, packed here by their definitions, compute as the floats they stand for."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.models import quantization
from tokenmill.engine.models.int8_linear import sums_exactly
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.stored_weights import stored_weights
from tokenmill.engine.pipeline import Pipeline
from tokenmill.kernels import ops
from tokenmill.producer.params import SamplingParams

# Read where triton is first imported, which transformers may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": GROUP}, awq),
    **{
        f"gptq-{bits}{'-moved' if moved else ''}": (
            {"quant_method": "gptq", "bits": bits, "desc_act": moved, "group_size": GROUP},
            lambda *a, bits=bits, moved=moved: gptq(*a, bits=bits, moved=moved, offset=1),
        )
        for bits in (4, 8)
        for moved in (False, True)
    },
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "group_size": GROUP},
        lambda *a: gptq(*a, bits=4, moved=False, offset=0),
    ),
    "int8": ({**COMPRESSED, "format": "int-quantized"}, int8),
    "fp8": ({**COMPRESSED, "format": "float-quantized"}, fp8),
}


@pytest.fixture(params=[(name, "llama") for name in FORMATS], ids="-".join)
def pair(
    request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> tuple[Path, Path]:
    """A checkpoint with quantized linears, and one with the floats that they stand for."""
    name, family = request.param
    directory, _ = tiny_checkpoint(family, num_hidden_layers=2, vocab_size=336)
    stored_config, make = FORMATS[name]
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
@pytest.mark.parametrize("pair", [("awq", "llama")], indirect=True)
def test_int8_linears_of_a_quantized_checkpoint(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The one is read, then the other is made of it; the log says so."""
    model = load(str(pair[0]), device="cpu", quantization="int8")
    size = f"{model.weights.nbytes / 2**20:.1f} MiB"
    text = f"weights stored as awq, 4 bits are held as int8, in {size}: they are quantized again"
    assert caplog.messages == [f"{text} as int8"]
    assert model.stored_as == "awq, 4 bits"
    assert not model.weights.lm_head.weight.numel()  # nothing plain is kept


KEPT = [
    ("awq", "llama"),
    ("gptq-4", "phi3"),
    ("gptq-4", "qwen2_moe"),
    ("gptq-v2", "llama"),
    ("int8", "qwen2"),
]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay packed on this CPU too, where plain torch multiplies by them."""
    monkeypatch.setattr(quantization, "runs_packed", lambda device: True)


@pytest.mark.parametrize("pair", KEPT, indirect=True, ids="-".join)
def test_packed_weights_compute_as_the_floats(
    pair: tuple[Path, Path], kept: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    own, twin = (load(str(directory), device="cpu") for directory in pair)
    stayed, plain = (m for m in caplog.messages if m.startswith("weights"))
    assert re.fullmatch(r"weights stored as .* stay so, in \d+\.\d MiB", stayed)
    assert re.fullmatch(r"weights are held as float32, in \d+\.\d MiB", plain)
    assert all(linear.weight.is_meta for linear in linears(own))
    ours, theirs = (sum(linear.nbytes for linear in linears(model)) for model in (own, twin))
    assert ours < theirs
    assert_same_logits(own, twin)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is not interpreted here")
@pytest.mark.parametrize("pair", [("awq", "llama")], indirect=True, ids="-".join)
def test_packed_weights_by_the_kernel(
    pair: tuple[Path, Path], kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, by the Triton kernel, interpreted."""
    from tokenmill.kernels import dequant_gemm

    calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return dequant_gemm.dequant_linear(*args, **kwargs)

    monkeypatch.setattr(ops, "dequant_linear", counted)
    assert_same_logits(*(load(str(directory), device="cpu") for directory in pair))
    assert len(calls) == 2 * 4  # a step with two layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pair", KEPT, indirect=True, ids="-".join)
def test_packed_weights_on_a_gpu(pair: tuple[Path, Path]) -> None:
    own, twin = (load(str(path), device="cuda", dtype="float32") for path in pair)
    assert all(linear.weight.is_meta for linear in linears(own))
    assert_same_logits(own, twin)


def linears(model: LoadedModel) -> list[Linear]:
    """Those that are stored quantized."""
    found: list[Linear] = []
    for layer in model.weights.layers:
        found += [layer.qkv, layer.attention_out]
        inner = list(layer.mlp.linears())
        found += [linear for linear in inner if linear.row_bits < 32]
    return found


def assert_same_logits(own: LoadedModel, twin: LoadedModel) -> None:
    config = EngineConfig(token_budget=32, max_model_len=64)
    prompt = [n * 37 % 320 + 5 for n in range(20)]
    rows = []
    for model in (own, twin):
        engine = Engine(model, config)
        engine.add("a", prompt, SamplingParams(max_tokens=1, prompt_logprobs=0, logprobs=8), seed=0)
        outputs = engine.step()
        assert outputs[-1].finish_reason
        rows.append([row for o in outputs for row in (*o.prompt_logprobs, *o.logprobs)])
        assert len(rows[-1]) == len(prompt)
    for row, want in zip(*rows, strict=True):
        assert row.token_id == want.token_id
        assert row.logprob == pytest.approx(want.logprob, abs=2e-4)


@pytest.mark.parametrize("pair", [("fp8", "llama")], indirect=True, ids="-".join)
def test_fp8_weights_stay_as_they_are(
    pair: tuple[Path, Path], kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "fp8_capability", lambda device: (8, 9))
    own, twin = (load(str(directory), device="cpu", dtype="bfloat16") for directory in pair)
    rows = torch.eye(48, dtype=torch.bfloat16)  # exact in fp8: the product is the weight
    stored, plain = (model.weights.layers[1].qkv for model in (own, twin))
    assert stored.nbytes < plain.nbytes * 0.6
    torch.testing.assert_close(stored(rows), plain(rows), rtol=1e-2, atol=1e-2)
    pipeline = Pipeline(str(pair[0]), device="cpu", dtype="bfloat16")
    assert len(pipeline([[5, 6, 7]], max_tokens=4, ignore_eos=True)[0].token_ids) == 4


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("gptq-4-moved", "llama"), "there is no kernel for this form of them"),
        (("gptq-8", "llama"), "there is no kernel for groups of their size"),
        (("fp8", "llama"), r"they need fp8 on a GPU of .* 8\.9 .* got fp8 on cpu"),
    ],
    indirect=["pair"],
)
def test_what_cannot_stay_packed_becomes_floats_and_says_why(
    pair: tuple[Path, Path], reason: str, kept: None, caplog: pytest.LogCaptureFixture
) -> None:
    own = load(str(pair[0]), device="cpu")
    assert not any(linear.weight.is_meta for linear in linears(own))
    (text,) = caplog.messages
    assert re.fullmatch(rf"weights stored as .* are held as float32, in .* MiB: {reason}.*", text)


@pytest.mark.parametrize("pair", [("awq", "llama")], indirect=True, ids="-".join)
@pytest.mark.parametrize("odd", ["model.layers.1.self_attn.k_proj", "lm_head"])
def test_linears_stored_otherwise_than_the_others(
    pair: tuple[Path, Path], odd: str, kept: None, caplog: pytest.LogCaptureFixture
) -> None:
    own, twin = (load_file(directory / "model.safetensors") for directory in pair)
    if odd == "lm_head":
        twin["lm_head.weight"], parts = awq(336, 48, torch.Generator().manual_seed(1))
        own.pop("lm_head.weight", None)
        own |= {f"lm_head.{part}": tensor for part, tensor in parts.items()}
    else:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(odd)}
        own[f"{odd}.weight"] = twin[f"{odd}.weight"]
    save_file(own, pair[0] / "model.safetensors")
    load(str(pair[0]), device="cpu")
    assert f"{odd}." in caplog.messages[0]
    assert caplog.messages[0].endswith("is not stored as the others are")
