"""RMSNorm, alone and fused with the residual addition before it, in Triton.

    total = x + residual                      (add_rms_norm only; rounded to the dtype of residual)
    y     = total / sqrt(mean(total ** 2) + eps) * weight

| tensor      | shape  | dtype                    | strides     |
| ----------- | ------ | ------------------------ | ----------- |
| x, residual | [T, H] | float32, bfloat16, half  | rows, 1     |
| weight      | [H]    | any of these             | 1           |
| y           | [T, H] | that of x (of residual)  | contiguous  |

One program per row, so a row's result does not depend on the rows beside it. Memory-bound: the sum
is read and written once, where two separate operations would move it twice.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_device, check_floating, check_rows, check_shape


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,  # [T, H], updated in place if ADD
    weight_ptr,
    y_ptr,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    H,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual_row = residual_ptr + row * residual_stride
        total += tl.load(residual_row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row + columns, rounded, mask=inside)
        total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / H + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = (total * scale * weight).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * y_stride + columns, y, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm the rows of `x` [T, H]; returns [T, H] in the dtype of `x`.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, weight)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, x, weight, y, eps, add=False)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to `residual` in place and norm the sum; returns (normed, residual), both [T, H].

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, weight)
    check_shape("residual", residual, *x.shape)
    check_floating("residual", residual)
    check_rows(residual=residual)
    check_device(x.device, residual=residual)
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, y, eps, add=True)
    return y, residual


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    check_shape("x", x, "T", "H")
    check_shape("weight", weight, x.shape[1])
    check_floating("x", x)
    check_floating("weight", weight)
    check_rows(x=x, weight=weight)
    check_device(x.device, weight=weight)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    *,
    add: bool,
) -> None:
    num_rows, width = x.shape
    if not x.numel():
        return
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        y,
        x.stride(0),
        residual.stride(0),
        y.stride(0),
        eps,
        width,
        ADD=add,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
