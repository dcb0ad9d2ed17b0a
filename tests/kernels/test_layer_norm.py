from collections.abc import Callable

import pytest
import torch

from tokenmill.kernels import reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 63), (3, 100), (2, 576), (1, 4097)])
def test_layer_norm(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.layer_norm import layer_norm

    x = (3 + torch.randn(rows, width, device=device)).to(dtype)
    weight, bias = torch.randn(2, width, device=device)
    assert_close(layer_norm(x, weight, bias, 1e-5), reference.layer_norm(x, weight, bias, 1e-5))
    assert_close(layer_norm(x, weight, None, 1e-5), reference.layer_norm(x, weight, None, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(7, 63), (3, 100), (2, 576)])
def test_add_layer_norm(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.layer_norm import add_layer_norm

    x, residual = torch.randn(2, rows, width, device=device).to(dtype)
    weight, bias = torch.randn(2, width, device=device)
    expected_y, expected_total = reference.add_layer_norm(x, residual, weight, bias, 1e-5)
    y, total = add_layer_norm(x, residual, weight, bias, 1e-5)
    assert total is residual
    assert_close(total, expected_total)
    assert_close(y, expected_y)


def test_a_mean_far_from_zero_loses_nothing(device: torch.device, assert_close: Compare) -> None:
    """A variance from the mean of squares would."""
    from tokenmill.kernels.layer_norm import layer_norm

    offsets = torch.linspace(-1, 1, 64, device=device)
    x = 64 + torch.round(offsets * 1024) / 1024  # whose sum is exact in float32, not its squares
    ones, zeros = torch.ones(64, device=device), torch.zeros(64, device=device)
    y = layer_norm(x[None], ones, zeros, 1e-5)
    assert_close(y, layer_norm(x[None] - 64, ones, zeros, 1e-5))


def test_rows_may_be_strided_and_none(device: torch.device, assert_close: Compare) -> None:
    from tokenmill.kernels.layer_norm import layer_norm

    x = torch.randn(5, 200, device=device)[:, 50:150]
    weight, bias = torch.randn(2, 100, device=device)
    assert_close(layer_norm(x, weight, bias, 1e-6), reference.layer_norm(x, weight, bias, 1e-6))
    assert layer_norm(x[:0], weight, bias, 1e-6).shape == (0, 100)


def test_a_wrong_bias_is_named(device: torch.device) -> None:
    from tokenmill.kernels.layer_norm import layer_norm

    weight, bias = torch.ones(64, device=device), torch.ones(63, device=device)
    with pytest.raises(ValueError, match=r"^bias: expected shape \[64\], got \[63\]$"):
        layer_norm(torch.zeros(2, 64, device=device), weight, bias, 1e-5)
