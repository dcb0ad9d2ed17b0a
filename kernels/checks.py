"""Argument checks of the kernels: one line per fault, `name: expected ..., got ...`.

They run at every launch, so they look at metadata only and never at the numbers in a tensor.
"""

import torch


def check_shape(name: str, tensor: torch.Tensor, *expected: int | str) -> None:
    """Compare the shape; a letter stands for a free dimension.

    Raises:
        ValueError: another number of dimensions, or another size.
    """
    shape = tensor.shape
    if len(shape) == len(expected):
        for size, want in zip(shape, expected, strict=True):
            if size != want and not isinstance(want, str):
                break
        else:
            return
    wanted = ", ".join(str(size) for size in expected)
    raise ValueError(f"{name}: expected shape [{wanted}], got {list(shape)}")


def check_dtype(name: str, tensor: torch.Tensor, *expected: torch.dtype) -> None:
    """Compare the dtype with those allowed.

    Raises:
        ValueError: none of them.
    """
    if tensor.dtype not in expected:
        wanted = " or ".join(str(dtype) for dtype in expected)
        raise ValueError(f"{name}: expected dtype {wanted}, got {tensor.dtype}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Accept the dtypes that the kernels compute in.

    Raises:
        ValueError: any other dtype.
    """
    check_dtype(name, tensor, torch.float32, torch.bfloat16, torch.float16)


def check_device(device: torch.device, **tensors: torch.Tensor) -> None:
    """Require all `tensors` on one device.

    Raises:
        ValueError: one lies elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_rows(**tensors: torch.Tensor) -> None:
    """Require a contiguous last dimension; the others may have any stride.

    Raises:
        ValueError: the last stride is not 1.
    """
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.stride(-1) != 1:
            strides = list(tensor.stride())
            raise ValueError(f"{name}: expected a last stride of 1, got strides {strides}")


def check_contiguous(**tensors: torch.Tensor) -> None:
    """Require dense tensors in row-major order.

    Raises:
        ValueError: one is a strided view.
    """
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            strides = list(tensor.stride())
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {strides}")


def check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Require `value` to be a multiple of `divisor`.

    Raises:
        ValueError: it is not.
    """
    if value % divisor:
        raise ValueError(f"{name}: expected a multiple of {divisor_name} = {divisor}, got {value}")
