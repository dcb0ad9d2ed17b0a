"""A mixture of experts on stacked weights, in Triton: routing, grouped products, the sum.

    p        = softmax(router_logits[t]);   chosen = the top_k of p, their shares p / sum p if NORM
    inner[i] = x[t(i)] W1[e(i)]^T                     for each assignment i of a token to an expert
    outer[i] = activation(inner[i]) W2[e(i)]^T
    out[t]   = sum over t's assignments, in the order of their ranks, of share * outer,
               and, if there is an expert for all tokens, sigmoid(gate[t]) * common[t]

| tensor        | shape        | dtype                   | strides    |
| ------------- | ------------ | ----------------------- | ---------- |
| router_logits | [T, E]       | float32, bfloat16, half | rows, 1    |
| shares        | [T, top_k]   | float32                 | contiguous |
| chosen        | [T, top_k]   | int32                   | contiguous |
| x             | [T, K]       | float32, bfloat16, half | rows, 1    |
| weight        | [E, N, K]    | that of x               | contiguous |
| common        | [T, N]       | that of x               | contiguous |
| gate          | [T, 1]       | float32, bfloat16, half | contiguous |
| order         | [T * top_k]  | int32                   | contiguous |
| ends          | [E]          | int32                   | contiguous |

Assignment i = t * top_k + rank. `order` lists the assignments sorted by expert, those of an expert
by number; `ends[e]` is where those of expert e end (`expert_order.py`). A tile of a grouped product
holds rows of one expert alone: expert e has its tiles from number `start // BLOCK_M + e` on, so
that the grid is the bound `T * top_k // BLOCK_M + E`, and nothing is read back (the numbering of
`paged_attention.py`).
Each row is one sum over K in one order: its bits do not depend on the other rows while the tiles
keep their height, of which there are two. With `fixed_tiles` there is one, that of
`fixed_linear.py`, which says why.

Among equal logits the expert of the lowest number is chosen.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import (
    check_contiguous,
    check_device,
    check_dtype,
    check_floating,
    check_rows,
    check_shape,
)


@triton.jit
def _route_kernel(
    logits_ptr,
    shares_ptr,
    chosen_ptr,
    logits_row,
    E,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    rank = tl.arange(0, BLOCK_K)
    inside = expert < E
    row = logits_ptr + token * logits_row
    logits = tl.load(row + expert, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.max(logits, axis=0)
    total = tl.sum(tl.exp(logits - highest), axis=0)
    left = logits
    best = tl.full([BLOCK_K], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for number in tl.static_range(TOP_K):
        top = tl.max(left, axis=0)
        first = tl.min(tl.where((left == top) & inside, expert, E - 1), axis=0)
        best = tl.where(rank == number, top, best)
        chosen = tl.where(rank == number, first, chosen)
        left = tl.where(expert == first, float("-inf"), left)
    shares = tl.exp(best - highest)
    shares = shares / (tl.sum(shares, axis=0) if NORM else total)
    place = token * TOP_K + rank
    tl.store(shares_ptr + place, shares, mask=rank < TOP_K)
    tl.store(chosen_ptr + place, chosen, mask=rank < TOP_K)


@triton.jit
def _grouped_linear_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    order_ptr,
    ends_ptr,
    x_row,
    E,
    N,
    K,
    PER_ROW: tl.constexpr,  # assignments that share a row of x
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + experts, mask=experts < E, other=2147483647)
    starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    first_tiles = tl.where(experts < E, starts // BLOCK_M + experts, 2147483647)
    expert = tl.sum((first_tiles <= tile).to(tl.int32), axis=0) - 1
    start = tl.sum(tl.where(experts == expert, starts, 0), axis=0)
    end = tl.sum(tl.where(experts == expert, ends, 0), axis=0)
    first_row = start + (tile - start // BLOCK_M - expert) * BLOCK_M
    if first_row >= end:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < end
    assignment = tl.load(order_ptr + rows, mask=row_inside, other=0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    output_inside = outputs < N
    inputs = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + (assignment // PER_ROW)[:, None] * x_row + inputs[None, :]
    weight = weight_ptr + expert.to(tl.int64) * N * K
    weights = weight + outputs.to(tl.int64)[:, None] * K + inputs[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = (k + inputs < K)[None, :]
        a = tl.load(x_rows + k, mask=row_inside[:, None] & inside, other=0.0)
        b = tl.load(weights + k, mask=output_inside[:, None] & inside, other=0.0)
        total += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    y = y_ptr + assignment[:, None] * N + outputs[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=row_inside[:, None] & output_inside[None, :])


@triton.jit
def _sum_experts_kernel(
    outer_ptr,
    shares_ptr,
    common_ptr,
    gate_ptr,
    out_ptr,
    N,
    TOP_K: tl.constexpr,
    HAS_COMMON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        place = token * TOP_K + rank
        row = tl.load(outer_ptr + place * N + columns, mask=inside, other=0.0)
        total += tl.load(shares_ptr + place) * row.to(tl.float32)
    if HAS_COMMON:
        row = tl.load(common_ptr + token * N + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.sigmoid(tl.load(gate_ptr + token).to(tl.float32)) * row
    tl.store(out_ptr + token * N + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def route(
    router_logits: torch.Tensor, top_k: int, *, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shares and the numbers of each token's best experts, best first, [T, top_k] both.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("router_logits", router_logits, "T", "E")
    check_floating("router_logits", router_logits)
    check_rows(router_logits=router_logits)
    num_tokens, num_experts = router_logits.shape
    if not 0 < top_k <= num_experts:
        raise ValueError(f"top_k: expected 1 to the {num_experts} experts, got {top_k}")
    device = router_logits.device
    shares = torch.empty((num_tokens, top_k), dtype=torch.float32, device=device)
    chosen = torch.empty((num_tokens, top_k), dtype=torch.int32, device=device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            router_logits,
            shares,
            chosen,
            router_logits.stride(0),
            num_experts,
            TOP_K=top_k,
            NORM=normalize,
            BLOCK_E=triton.next_power_of_2(num_experts),
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=1,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )
    return shares, chosen


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    *,
    fixed_tiles: bool = False,
) -> torch.Tensor:
    """Row i of the result [A, N] is x's row of assignment i times its expert's weight.

    `x` has a row for each assignment, or one for each token; then A is a multiple of its rows.
    With `fixed_tiles` a row has the same bits in any batch.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("x", x, "T", "K")
    check_shape("weight", weight, "E", "N", x.shape[1])
    check_shape("order", order, "T * top_k")
    check_shape("ends", ends, weight.shape[0])
    check_floating("x", x)
    check_dtype("weight", weight, x.dtype)
    check_dtype("order", order, torch.int32)
    check_dtype("ends", ends, torch.int32)
    check_rows(x=x)
    check_contiguous(weight=weight, order=order, ends=ends)
    check_device(x.device, weight=weight, order=order, ends=ends)
    count, (num_experts, width, depth) = order.shape[0], weight.shape
    if count and (not x.shape[0] or count % x.shape[0]):
        raise ValueError(f"order: expected a multiple of the {x.shape[0]} rows of x, got {count}")
    y = torch.empty((count, width), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    # Few rows for each expert, as in decoding, waste most of a tall tile.
    block_m = 16 if count <= 16 * num_experts and not fixed_tiles else 64
    block_n, block_k = (32, 32) if x.dtype == torch.float32 else (128, 64)
    _grouped_linear_kernel[(count // block_m + num_experts, triton.cdiv(width, block_n))](
        x,
        weight,
        y,
        order,
        ends,
        x.stride(0),
        num_experts,
        width,
        depth,
        PER_ROW=count // x.shape[0],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_E=triton.next_power_of_2(num_experts),
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return y


def sum_experts(
    outer: torch.Tensor,
    shares: torch.Tensor,
    common: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """The shares' sum [T, N] of the assignments' rows [T * top_k, N], and the gated `common`.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("shares", shares, "T", "top_k")
    num_tokens, top_k = shares.shape
    check_shape("outer", outer, num_tokens * top_k, "N")
    check_floating("outer", outer)
    check_dtype("shares", shares, torch.float32)
    check_contiguous(outer=outer, shares=shares)
    check_device(outer.device, shares=shares)
    width = outer.shape[1]
    if common is not None and gate is not None:
        check_shape("common", common, num_tokens, width)
        check_dtype("common", common, outer.dtype)
        check_shape("gate", gate, num_tokens, 1)
        check_floating("gate", gate)
        check_contiguous(common=common, gate=gate)
        check_device(outer.device, common=common, gate=gate)
    out = torch.empty((num_tokens, width), dtype=outer.dtype, device=outer.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(width))
        _sum_experts_kernel[(num_tokens, triton.cdiv(width, block))](
            outer,
            shares,
            outer if common is None else common,
            outer if gate is None else gate,
            out,
            width,
            TOP_K=top_k,
            HAS_COMMON=common is not None and gate is not None,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
