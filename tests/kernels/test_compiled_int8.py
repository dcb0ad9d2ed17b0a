"""The compiled int8 product: its formula, its extremes, and bits that no neighbour changes."""

import pytest
import torch

from tokenmill.kernels import compiler, cpu_ops

pytestmark = pytest.mark.skipif(
    not compiler.has_byte_products(), reason="this processor has no AVX-512 VNNI"
)
SHAPES = [(64, 64), (960, 576), (576, 1536), (128, 320)]


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], the same laid out, and scales [N]."""
    scales = weight.abs().amax(dim=1).clamp(min=1e-30) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)
    return codes, cpu_ops.pack_int8(codes), scales


def expected(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The formula in float64, with the codes of the rows in float32."""
    groups = rows.view(len(rows), rows.shape[1] // 64, 64)
    largest = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-30)
    quantized = (groups.double() * (127 / largest).double()).round() * (largest / 127).double()
    return quantized.flatten(1) @ codes.double().T * scales.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 48, 133])
def test_product_is_that_of_the_formula(count: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(count)
    codes, panels, scales = packed(torch.randn(shape, generator=generator))
    rows = torch.randn(count, shape[1], generator=generator) * 3
    got = cpu_ops.packed_int8_linear(rows, panels, scales)
    assert got.shape == (count, shape[0])
    assert torch.allclose(got.double(), expected(rows, codes, scales), rtol=1e-5, atol=5e-5)


def test_rows_may_be_part_of_wider_ones() -> None:
    _, panels, scales = packed(torch.randn(64, 128))
    wide = torch.randn(9, 512)
    whole = cpu_ops.packed_int8_linear(wide[:, 128:256].contiguous(), panels, scales)
    assert torch.equal(cpu_ops.packed_int8_linear(wide[:, 128:256], panels, scales), whole)
    across = wide[:, 128:256].T.contiguous().T
    assert torch.equal(cpu_ops.packed_int8_linear(across, panels, scales), whole)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_values_neither_saturate_nor_wrap(sign: float) -> None:
    weight = torch.ones(64, 4096)
    weight[1::2] = -1
    _, panels, scales = packed(weight)
    product = cpu_ops.packed_int8_linear(torch.full((2, 4096), sign), panels, scales)
    assert product[0].tolist() == pytest.approx([4096 * sign, -4096 * sign] * 32)


def test_zeros_are_zeros_and_nothing_else_becomes_finite() -> None:
    weight = torch.randn(64, 128)
    weight[3] = 0
    _, panels, scales = packed(weight)
    rows = torch.randn(5, 128)
    rows[0] = 0
    rows[1, 5], rows[2, 70], rows[3, 127] = float("nan"), float("-nan"), float("inf")
    product = cpu_ops.packed_int8_linear(rows, panels, scales)
    assert product[0].tolist() == [0.0] * 64
    assert product[1:3].isnan().all()
    assert not product[3].isfinite().any()
    assert product[4, 3] == 0.0
    assert product[4].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_among_others(
    shape: tuple[int, int], threads: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    _, panels, scales = packed(torch.randn(shape, generator=generator))
    rows = torch.randn(133, shape[1], generator=generator)
    whole = cpu_ops.packed_int8_linear(rows, panels, scales)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 3, 4, 5, 8, 31, 32, 33, 100):
            for start in (0, 133 - count):
                part = rows[start : start + count]
                got = cpu_ops.packed_int8_linear(part, panels, scales)
                assert torch.equal(got, whole[start : start + count])
    finally:
        torch.set_num_threads(before)
