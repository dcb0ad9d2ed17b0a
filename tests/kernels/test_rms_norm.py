from collections.abc import Callable

import pytest
import torch

from tokenmill.kernels import reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 63), (3, 100), (2, 576), (1, 4097)])
def test_rms_norm(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.rms_norm import rms_norm

    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 63), (3, 100), (2, 576)])
def test_add_rms_norm(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.rms_norm import add_rms_norm

    x, residual = torch.randn(2, rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    expected_y, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert total is residual
    assert_close(total, expected_total)
    assert_close(y, expected_y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_weight", [True, False])
def test_what_is_added_may_be_normed_before(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    has_weight: bool,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.rms_norm import add_rms_norm

    x, residual = (5 * torch.randn(2, 3, 100, device=device)).to(dtype)
    weight = torch.randn(100, device=device)
    post = torch.rand(100, device=device) / 4  # so that what it rounds is less than the tolerance
    given = weight if has_weight else None
    expected_y, expected_total = reference.add_rms_norm(x, residual, given, 1e-5, post=post)
    before = x.clone()
    y, total = add_rms_norm(x, residual, given, 1e-5, post=post)
    assert total is residual
    assert (y is residual) is not has_weight
    assert torch.equal(x, before)
    assert_close(total, expected_total)
    assert_close(y, expected_y)


def test_what_is_added_is_rounded_before(device: torch.device) -> None:
    """As where the norm is a kernel of its own; bit for bit."""
    from tokenmill.kernels.rms_norm import add_rms_norm, rms_norm

    x, residual = (5 * torch.randn(2, 9, 256, device=device)).bfloat16()
    post = torch.randn(256, device=device)
    _, together = add_rms_norm(x, residual.clone(), None, 1e-5, post=post)
    _, apart = add_rms_norm(rms_norm(x, post, 1e-5), residual.clone(), None, 1e-5)
    assert torch.equal(together, apart)


def test_rows_may_be_strided(device: torch.device, assert_close: Compare) -> None:
    from tokenmill.kernels.rms_norm import rms_norm

    x = torch.randn(5, 200, device=device)[:, 50:150]
    weight = torch.randn(100, device=device)
    assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_no_rows(device: torch.device) -> None:
    from tokenmill.kernels.rms_norm import rms_norm

    x = torch.empty(0, 64, device=device)
    assert rms_norm(x, torch.ones(64, device=device), 1e-5).shape == (0, 64)


def test_a_wrong_weight_is_named(device: torch.device) -> None:
    from tokenmill.kernels.rms_norm import rms_norm

    x = torch.zeros(2, 64, device=device)
    with pytest.raises(ValueError, match=r"^weight: expected shape \[64\], got \[63\]$"):
        rms_norm(x, torch.ones(63, device=device), 1e-5)
