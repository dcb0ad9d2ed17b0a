"""The assignments of tokens to experts sorted by expert, in Triton: a counting sort in one launch.

    order   the numbers of assignments, those of expert 0 first, each expert's in rising order
    ends    where those of each expert end

| tensor | shape      | dtype | strides    |
| ------ | ---------- | ----- | ---------- |
| chosen | [T, top_k] | int32 | contiguous |
| order  | [A]        | int32 | contiguous |
| ends   | [E]        | int32 | contiguous |

with A = T * top_k. A program for each expert reads all of `chosen` twice, which is in the L2 cache:
it counts the assignments of lower experts, then puts its own behind them.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_contiguous, check_dtype, check_shape

_BLOCK = 1024


# The count changes from step to step: specialised, each new kind would compile while serving.
@triton.jit(do_not_specialize=["A"])
def _expert_order_kernel(chosen_ptr, order_ptr, ends_ptr, A, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    lower = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for start in range(0, A, BLOCK):
        inside = start + places < A
        chosen = tl.load(chosen_ptr + start + places, mask=inside, other=0x7FFFFFFF)
        lower += (chosen < expert).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    begin = tl.sum(lower, axis=0)
    tl.store(ends_ptr + expert, begin + tl.sum(own, axis=0))
    for start in range(0, A, BLOCK):
        inside = start + places < A
        chosen = tl.load(chosen_ptr + start + places, mask=inside, other=0x7FFFFFFF)
        is_own = (chosen == expert).to(tl.int32)
        rank = tl.cumsum(is_own, axis=0) - is_own
        tl.store(order_ptr + begin + rank, start + places, mask=chosen == expert)
        begin += tl.sum(is_own, axis=0)


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`order` and `ends` of the table above; `chosen` is of 0 to `num_experts` - 1.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    check_shape("chosen", chosen, "T", "top_k")
    check_dtype("chosen", chosen, torch.int32)
    check_contiguous(chosen=chosen)
    order = torch.empty(chosen.numel(), dtype=torch.int32, device=chosen.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    _expert_order_kernel[(num_experts,)](
        chosen,
        order,
        ends,
        chosen.numel(),
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
    return order, ends
