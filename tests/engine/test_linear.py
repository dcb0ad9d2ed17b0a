"""Linear: packed or not, the product is that of the plain weight."""

import pytest
import torch

from tokenmill.engine.models.linear import Linear
from tokenmill.kernels import compiler, cpu_ops


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 48, 300])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (96, 64), (331, 48), (128, 700)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_product_equals_the_plain_one(rows: int, shape: tuple[int, int], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if with_bias else None
    x = torch.randn(rows, shape[1], generator=generator)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with torch.inference_mode():
        layer = Linear(weight, bias)
        layer.pack()
        got = layer(x)
    assert got.shape == (rows, shape[0])
    assert torch.allclose(got.double(), expected, atol=1e-4)


def test_other_types_keep_their_weight() -> None:
    weight, x = torch.randn(6, 4, dtype=torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    layer = Linear(weight)
    layer.pack()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight))


def test_a_change_of_the_plain_weight_does_not_reach_a_packed_one() -> None:
    """So the plain weight can be dropped after packing."""
    weight = torch.ones(8, 8)
    layer = Linear(weight)
    layer.pack()
    weight.zero_()
    packed = cpu_ops.can_pack(weight) or hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    assert layer(torch.ones(1, 8)).sum().item() == (64.0 if packed else 0.0)


@pytest.mark.skipif(not compiler.has_wide_vectors(), reason="needs AVX-512")
@pytest.mark.parametrize("shape", [(64, 1), (64, 16), (192, 75), (320, 576)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_panels_are_the_transposed_rows(threads: int, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    expected = weight.view(-1, 64, shape[1]).transpose(1, 2).contiguous()
    across = weight.T.contiguous().T
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu_ops.pack(across), expected)
        packed = cpu_ops.pack(weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed, expected)
    assert packed.data_ptr() == weight.data_ptr(), "in its own memory"


@pytest.mark.skipif(not compiler.has_wide_vectors(), reason="needs AVX-512")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_of_a_compiled_product_has_the_same_bits_in_any_batch(
    threads: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 700, generator=generator) for rows in (320, 301))
    bias = torch.randn(320, generator=generator)
    packed = cpu_ops.pack(weight.clone())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = cpu_ops.packed_linear(x, packed, bias)
        torch.testing.assert_close(whole, x @ weight.T + bias, atol=2e-4, rtol=0)
        for start, end in ((0, 1), (299, 301), (20, 23), (30, 47), (40, 46), (7, 16), (0, 64)):
            part = cpu_ops.packed_linear(x[start:end], packed, bias)
            assert torch.equal(part, whole[start:end])
    finally:
        torch.set_num_threads(before)
