"""int8 linears: the integers are multiplied exactly, and no row depends on another."""

import subprocess
import sys

import pytest
import torch

from tokenmill.engine.models.int8_linear import (
    GroupedInt8Weight,
    Int8Weight,
    int8_weight,
    quantize_rows,
    sums_exactly,
)
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.quantization import INT8
from tokenmill.kernels import compiler

pytestmark = pytest.mark.skipif(not sums_exactly(), reason="this processor adds int8 inexactly")


def expected(rows: torch.Tensor, weight: torch.Tensor, row_bits: int) -> torch.Tensor:
    """The formula, in float64 over integers: no rounding but that of the codes."""
    codes, scales = (part.double() for part in quantize_rows(weight))
    levels, offset = (127, 128) if row_bits == 8 else (127 * 256, 257 * 128)
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    row_codes = (rows * (levels / largest) + (offset + 0.5)).floor().double() - offset
    return row_codes @ codes.T * scales * (largest.double() / levels)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 48, 300])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (96, 64), (331, 48), (50, 1537)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("row_bits", [8, 16])
def test_product_is_that_of_the_formula(
    count: int, shape: tuple[int, int], with_bias: bool, row_bits: int
) -> None:
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    rows = torch.randn(count, shape[1], generator=generator) * 3
    with torch.inference_mode():
        layer = Linear(weight, bias, row_bits=row_bits)
        layer.pack(INT8)
        got = layer(rows)
    want = expected(rows, weight, row_bits) + (0 if bias is None else bias)
    assert got.shape == (count, shape[0])
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("row_bits", "most"), [(8, 0.015), (16, 0.008)])
def test_error_against_the_float_product(row_bits: int, most: float) -> None:
    """Rows of 16 bits leave the error of the weights alone."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(256, 512, generator=generator), torch.randn(9, 512)
    plain = rows @ weight.T
    relative = (Int8Weight(weight, row_bits)(rows) - plain).norm() / plain.norm()
    assert relative < most
    codes, scales = quantize_rows(weight)
    of_weights = (rows @ (codes * scales[:, None]).T - plain).norm() / plain.norm()
    assert (relative < 1.02 * of_weights) == (row_bits == 16)


@pytest.mark.parametrize("row_bits", [8, 16])
def test_the_largest_values_neither_saturate_nor_wrap(row_bits: int) -> None:
    weight = torch.ones(4, 4096)
    weight[1::2] = -1
    for sign in (1.0, -1.0):
        product = Int8Weight(weight, row_bits)(torch.full((2, 4096), sign))
        assert product[0].tolist() == pytest.approx([4096 * sign, -4096 * sign] * 2)


@pytest.mark.parametrize("row_bits", [8, 16])
def test_zeros_are_zeros_and_nothing_else_becomes_finite(row_bits: int) -> None:
    weight = torch.randn(8, 16)
    weight[3] = 0
    rows = torch.randn(3, 16)
    rows[0] = 0
    rows[1, 5] = float("nan")
    product = Int8Weight(weight, row_bits)(rows)
    assert product[0].tolist() == [0.0] * 8
    assert product[1].isnan().all()
    assert product[2, 3] == 0.0


@pytest.mark.parametrize(("width", "out"), [(576, 960), (1536, 576), (77, 50), (1, 3)])
@pytest.mark.parametrize("row_bits", [8, 16])
def test_a_row_has_the_same_bits_alone_and_among_others(
    width: int, out: int, row_bits: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = Int8Weight(torch.randn(out, width, generator=generator), row_bits)
    rows = torch.randn(513, width, generator=generator)
    whole = weight(rows)
    for count in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 64, 100, 255):
        for start in (0, 513 - count):
            assert torch.equal(weight(rows[start : start + count]), whole[start : start + count])


@pytest.mark.skipif(not compiler.has_byte_products(), reason="no AVX-512 VNNI")
def test_groups_of_eight_bits_stand_in_for_rows_of_sixteen() -> None:
    """One channel 50 times the others costs its group its precision, not the row."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 512, generator=generator)
    rows = torch.randn(9, 512, generator=generator)
    rows[:, 77] *= 50
    plain = rows @ weight.T
    errors = {
        kind: (quantized(rows) - plain).norm().item()
        for kind, quantized in (
            ("groups", int8_weight(weight, 8)),
            ("rows of 8", Int8Weight(weight, 8)),
            ("rows of 16", Int8Weight(weight, 16)),
        )
    }
    assert isinstance(int8_weight(weight, 8), GroupedInt8Weight)
    assert errors["groups"] < 0.6 * errors["rows of 8"]
    assert errors["rows of 16"] < errors["groups"]


@pytest.mark.parametrize("shape", [(65, 128), (64, 100)], ids=str)
def test_a_shape_without_whole_groups_is_a_product_of_the_library(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    assert isinstance(int8_weight(weight, 16), Int8Weight)


@pytest.mark.skipif(not compiler.has_wide_vectors(), reason="this processor has no AVX-512")
def test_a_program_of_floats_needs_no_products_of_bytes() -> None:
    """On a processor without VNNI, LLVM ends the process where such a kernel is compiled."""
    told = "import sys, tokenmill.engine.models.layer_program; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, timeout=60
    )
    modules = ended.stdout.split()
    assert "tokenmill.kernels.compiled_linear" not in modules  # each linear brings its own
    assert "tokenmill.kernels.compiled_int8" not in modules
    assert "tokenmill.kernels.compiled_attention" in modules
