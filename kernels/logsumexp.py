"""log(sum(exp(x))) of rows of logits, in Triton; a row's bits do not depend on the rows beside it.

    y[r] = h + log(sum_v exp(x[r, v] - h)),   h = max_v x[r, v]

| tensor | shape  | dtype                   | strides    |
| ------ | ------ | ----------------------- | ---------- |
| x      | [R, V] | float32, bfloat16, half | rows, 1    |
| y      | [R]    | float32                 | contiguous |

One program a row reads it twice, the second time from the L2; torch's own writes it twice beside
that, and divides it among programs by how many rows there are.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_floating, check_rows, check_shape

_BLOCK = 4096


@triton.jit
def _logsumexp_kernel(x_ptr, y_ptr, x_stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = x_ptr + row * x_stride + columns
    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        part = tl.load(x + start, mask=start + columns < V, other=float("-inf"))
        lanes = tl.maximum(lanes, part.to(tl.float32))
    highest = tl.max(lanes, axis=0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        part = tl.load(x + start, mask=start + columns < V, other=float("-inf"))
        sums += tl.exp(part.to(tl.float32) - highest)
    tl.store(y_ptr + row, highest + tl.log(tl.sum(sums, axis=0)))


def logsumexp(x: torch.Tensor) -> torch.Tensor:
    """Return y [R] of the formula above; of a row without a finite element it is NaN.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("x", x, "R", "V")
    check_floating("x", x)
    check_rows(x=x)
    num_rows, width = x.shape
    y = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        _logsumexp_kernel[(num_rows,)](
            x,
            y,
            x.stride(0),
            width,
            BLOCK=min(_BLOCK, max(32, triton.next_power_of_2(width))),
            num_warps=8,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )
    return y
