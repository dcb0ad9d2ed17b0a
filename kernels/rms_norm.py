"""RMSNorm, alone and fused with the residual addition before it, in Triton.

    norm(x, weight) = x / sqrt(mean(x ** 2) + eps) * weight
    x     = norm(x, post)                     (add_rms_norm with `post`; rounded to the dtype of x)
    total = x + residual                      (add_rms_norm only; rounded to the dtype of residual)
    y     = norm(total, weight)               (total itself if there is no weight)

| tensor       | shape  | dtype                    | strides     |
| ------------ | ------ | ------------------------ | ----------- |
| x, residual  | [T, H] | float32, bfloat16, half  | rows, 1     |
| weight, post | [H]    | any of these             | 1           |
| y            | [T, H] | that of x (of residual)  | contiguous  |

One program per row, so a row's result does not depend on the rows beside it. Memory-bound: the sum
is read and written once, where two separate operations would move it twice.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_device, check_floating, check_rows, check_shape


@triton.jit
def _normed(row, weight, H, eps):
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / H + eps)
    return row * scale * weight.to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,  # [T, H], updated in place if ADD
    weight_ptr,
    post_ptr,
    y_ptr,
    x_stride,
    residual_stride,
    y_stride,
    eps,
    H,
    ADD: tl.constexpr,
    POST: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual_row = residual_ptr + row * residual_stride
        residual = tl.load(residual_row + columns, mask=inside, other=0.0)
    if NORM:  # asked for before the sums, which its users wait for
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if POST:
        post = tl.load(post_ptr + columns, mask=inside, other=0.0)
        total = _normed(total, post, H, eps)
        total = total.to(x_ptr.dtype.element_ty).to(tl.float32)
    if ADD:
        total += residual.to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row + columns, rounded, mask=inside)
        total = rounded.to(tl.float32)
    if NORM:
        y = _normed(total, weight, H, eps).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * y_stride + columns, y, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm the rows of `x` [T, H]; returns [T, H] in the dtype of `x`.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, weight=weight)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, x, weight, None, y, eps, add=False)
    return y


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    post: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x`, normed by `post` if that is given, to `residual` in place, and norm the sum.

    Returns (normed, residual), both [T, H]; without a weight the residual twice.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check(x, weight=weight, post=post)
    check_shape("residual", residual, *x.shape)
    check_floating("residual", residual)
    check_rows(residual=residual)
    check_device(x.device, residual=residual)
    y = residual
    if weight is not None:
        y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, post, y, eps, add=True)
    return y, residual


def _check(x: torch.Tensor, **weights: torch.Tensor | None) -> None:
    check_shape("x", x, "T", "H")
    check_floating("x", x)
    check_rows(x=x)
    for name, weight in weights.items():
        if weight is not None:
            check_shape(name, weight, x.shape[1])
            check_floating(name, weight)
            check_rows(**{name: weight})
            check_device(x.device, **{name: weight})


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    post: torch.Tensor | None,
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
        y if weight is None else weight,
        y if post is None else post,
        y,
        x.stride(0),
        residual.stride(0),
        y.stride(0),
        eps,
        width,
        ADD=add,
        POST=post is not None,
        NORM=weight is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 4), 16),
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
