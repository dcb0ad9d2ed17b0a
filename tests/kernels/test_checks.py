import pytest
import torch

from tokenmill.kernels import checks


def test_shape_with_free_dimensions() -> None:
    checks.check_shape("x", torch.zeros(3, 4), "T", 4)
    with pytest.raises(ValueError, match=r"^x: expected shape \[T, 4\], got \[3, 5\]$"):
        checks.check_shape("x", torch.zeros(3, 5), "T", 4)
    with pytest.raises(ValueError, match=r"^x: expected shape \[T, 4\], got \[4\]$"):
        checks.check_shape("x", torch.zeros(4), "T", 4)


def test_dtype_lists_what_is_allowed() -> None:
    checks.check_floating("x", torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"^x: expected dtype torch.float32 or .* or .*, got torch.float64$"
    ):
        checks.check_floating("x", torch.zeros(1, dtype=torch.float64))


def test_device() -> None:
    checks.check_device(torch.device("cpu"), x=torch.zeros(1))
    with pytest.raises(ValueError, match=r"^y: expected device cpu, got meta$"):
        checks.check_device(torch.device("cpu"), x=torch.zeros(1), y=torch.zeros(1, device="meta"))


def test_strides() -> None:
    matrix = torch.zeros(4, 6)
    checks.check_rows(x=matrix[:, 2:5])
    with pytest.raises(ValueError, match=r"^x: expected a last stride of 1, got strides \[1, 6\]$"):
        checks.check_rows(x=matrix.T)
    with pytest.raises(ValueError, match=r"^x: expected a contiguous tensor, got strides \[6, 1\]"):
        checks.check_contiguous(x=matrix[:, 2:5])


def test_divisible() -> None:
    checks.check_divisible("heads", 9, "Hkv", 3)
    with pytest.raises(ValueError, match=r"^heads: expected a multiple of Hkv = 4, got 9$"):
        checks.check_divisible("heads", 9, "Hkv", 4)
