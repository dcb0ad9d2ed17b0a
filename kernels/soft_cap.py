"""The soft cap of logits, in Triton: one pass that also makes them float32.

    y = cap * tanh(x / cap),   tanh(z) = 2 / (1 + exp(-2z)) - 1

| tensor | shape  | dtype                   | strides    |
| ------ | ------ | ----------------------- | ---------- |
| x      | [R, V] | float32, bfloat16, half | rows, 1    |
| y      | [R, V] | float32                 | contiguous |
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_floating, check_rows, check_shape

_BLOCK = 2048


@triton.jit
def _soft_cap_kernel(x_ptr, y_ptr, x_stride, V, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # From -30 on it is -1 in float32, and exp would overflow further down.
    z = tl.maximum(x / cap, -30.0, propagate_nan=tl.PropagateNan.ALL)
    y = cap * (2.0 * tl.sigmoid(2.0 * z) - 1.0)
    tl.store(y_ptr + row * V + columns, y, mask=inside)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Cap the rows of `x` [R, V]; returns [R, V] float32.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("x", x, "R", "V")
    check_floating("x", x)
    check_rows(x=x)
    num_rows, width = x.shape
    y = torch.empty((num_rows, width), dtype=torch.float32, device=x.device)
    if y.numel():
        _soft_cap_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            x,
            y,
            x.stride(0),
            width,
            float(cap),
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )
    return y
