"""fp8 linears: torch's product runs on a CPU too, so that everything but the speed shows here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.loader import load
from tokenmill.engine.models import quantization
from tokenmill.engine.models.fp8_linear import Fp8Weight, quantize_rows, quantize_weight
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.quantization import FP8, choose_quantization
from tokenmill.engine.models.shard import Shard
from tokenmill.engine.pipeline import Pipeline
from tokenmill.producer.errors import InvalidRequest

TinyCheckpoint = Callable[..., tuple[Path, Any]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.param)
    has_fp8 = torch.cuda.is_available() and quantization.fp8_capability(device) >= (8, 9)
    if request.param == "cuda" and not has_fp8:
        pytest.skip("needs a CUDA device of compute capability 8.9 or more")
    return device


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def test_rows_come_back_from_their_codes() -> None:
    """Half a step of e4m3 is a sixteenth of a value; those near nothing are rounded off."""
    rows = torch.cat([random(9, 64) * 1000, torch.zeros(1, 64), random(1, 64) * 1e-9])
    codes, scales = quantize_rows(rows)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().abs().amax(dim=1)[:9].tolist() == [448.0] * 9
    back, largest = codes.float() * scales, rows.float().abs().amax(dim=1, keepdim=True)
    assert torch.all((back - rows).abs() <= torch.maximum(rows.abs() / 16, largest / 448 * 2**-9))


def test_a_row_is_quantized_by_itself() -> None:
    """Neighbours change nothing, not even ones that are no numbers."""
    rows = random(3, 32)
    alone, _ = quantize_rows(rows[:1])
    rows[1], rows[2, 5] = torch.inf, torch.nan
    beside, _ = quantize_rows(rows)
    assert torch.equal(alone[0].view(torch.uint8), beside[0].view(torch.uint8))
    assert beside.float()[1:].isnan().all()


@pytest.mark.parametrize("count", [0, 1, 3, 17, 130])
@pytest.mark.parametrize(("out", "width"), [(16, 16), (48, 80), (96, 512)])
def test_product_is_that_of_the_formula(
    device: torch.device, count: int, out: int, width: int
) -> None:
    weight, rows, bias = random(out, width), random(count, width), random(out)
    made = quantize_weight(weight.to(device))
    assert isinstance(made, Fp8Weight)
    assert made.nbytes == out * width + 4 * out
    got = made(rows.to(device), bias.to(device)).cpu()
    (x, x_scales), (w, w_scales) = quantize_rows(rows), quantize_rows(weight)
    want = (x.double() * x_scales) @ (w.double() * w_scales).T + bias.double()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=1.6e-2, atol=1.6e-2 * width**0.5)


def test_a_shape_that_cannot_be_multiplied_stays_float() -> None:
    weight, rows = random(20, 16), random(2, 16)
    linear = Linear(weight)
    linear.pack(FP8)
    assert torch.equal(linear(rows), rows @ weight.T)
    assert linear.nbytes == weight.nbytes


@pytest.fixture
def with_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU passes for a GPU that has fp8."""
    monkeypatch.setattr(quantization, "fp8_capability", lambda device: (8, 9))


def test_a_model_of_fp8_linears_is_near_the_model(
    tiny_checkpoint: TinyCheckpoint, with_fp8: None
) -> None:
    directory, reference = tiny_checkpoint("llama", intermediate_size=96)
    pipeline = Pipeline(str(directory), device="cpu", dtype="bfloat16", quantization="fp8")
    prompt = [n * 37 % 320 + 5 for n in range(40)]
    (answer,) = pipeline([prompt], max_tokens=1, prompt_logprobs=0)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for row, want in zip(answer.prompt_logprobs, expected, strict=False):
        assert row.logprob == pytest.approx(want[row.token_id].item(), abs=1.5)
    model = load(str(directory), device="cpu", dtype="bfloat16", quantization="fp8")
    layer, head = model.weights.layers[0], model.weights.lm_head
    assert not any(linear.weight.numel() for linear in (layer.qkv, *layer.mlp.linears()))
    assert head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "got"),
    [
        ((0, 0), "cpu", torch.float32, r"fp8 on cpu \(compute capability none\) in float32"),
        ((8, 0), "cuda", torch.bfloat16, r"fp8 on cuda \(compute capability 8.0\) in bfloat16"),
        ((9, 0), "cuda", torch.float16, r"fp8 on cuda \(compute capability 9.0\) in float16"),
    ],
)
def test_refused_at_the_start(
    capability: tuple[int, int],
    device: str,
    dtype: torch.dtype,
    got: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantization, "fp8_capability", lambda device: capability)
    expected = "quantization must be fp8 on a GPU of compute capability 8.9 or more in bfloat16"
    with pytest.raises(InvalidRequest, match=rf"{expected}, got '{got}'.* --quantization none"):
        choose_quantization("fp8", torch.device(device), dtype)


def test_a_divided_model_is_refused(with_fp8: None) -> None:
    with pytest.raises(InvalidRequest, match="fp8 on 2 ranks"):
        choose_quantization("fp8", torch.device("cuda"), torch.bfloat16, Shard(0, 2))
