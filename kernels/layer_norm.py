"""Layer norm, alone and fused with the residual addition before it, in Triton.

    total = x + residual                  (add_layer_norm only; rounded to the dtype of residual)
    y     = (total - mean(total)) / sqrt(variance(total) + eps) * weight + bias

| tensor       | shape  | dtype                    | strides     |
| ------------ | ------ | ------------------------ | ----------- |
| x, residual  | [T, H] | float32, bfloat16, half  | rows, 1     |
| weight, bias | [H]    | any of these             | 1           |
| y            | [T, H] | that of x (of residual)  | contiguous  |

One program per row, which stays in registers: the variance is that of the differences from the
mean, in a second pass over them. Memory-bound.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_device, check_floating, check_rows, check_shape


@triton.jit
def _layer_norm_kernel(
    x_ptr,
    residual_ptr,  # [T, H], updated in place if ADD
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    H,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)  # before the sums, not after
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if ADD:
        residual_row = residual_ptr + row * residual_stride
        total += tl.load(residual_row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row + columns, rounded, mask=inside)
        total = rounded.to(tl.float32)
    centred = tl.where(inside, total - tl.sum(total, axis=0) / H, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / H + eps)
    y = centred * scale * weight.to(tl.float32)
    if HAS_BIAS:
        y += bias.to(tl.float32)
    tl.store(y_ptr + row * y_stride + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Norm the rows of `x` [T, H]; returns [T, H] in the dtype of `x`.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, weight, bias)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, x, weight, bias, y, eps, add=False)
    return y


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to `residual` in place and norm the sum; returns (normed, residual), both [T, H].

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, weight, bias)
    check_shape("residual", residual, *x.shape)
    check_floating("residual", residual)
    check_rows(residual=residual)
    check_device(x.device, residual=residual)
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, bias, y, eps, add=True)
    return y, residual


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_shape("x", x, "T", "H")
    check_floating("x", x)
    check_rows(x=x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_shape(name, parameter, x.shape[1])
            check_floating(name, parameter)
            check_rows(**{name: parameter})
            check_device(x.device, **{name: parameter})


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    eps: float,
    *,
    add: bool,
) -> None:
    num_rows, width = x.shape
    if not x.numel():
        return
    block = triton.next_power_of_2(width)
    _layer_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        weight if bias is None else bias,
        y,
        x.stride(0),
        residual.stride(0),
        y.stride(0),
        eps,
        width,
        ADD=add,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 4), 16),
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
