"""Parts of a sequence's keys merged into one softmax, in Triton: the end of decode attention.

A part has the three values of a running softmax (`attention_tile.py`). Parts are merged in order
within groups of GROUP; the values of AT_ONCE groups are summed in one order, those sums in order:

    parts    0 .. 15 | 16 .. 31 | ... | 112 .. 127 | 128 .. 143 | ...
    groups   in order, eight of them side by side  | the next eight

So that a program of the first kernel that takes a whole group can merge it itself: the values of
one part or one group merged with nothing are what they were, to the last bit.

| tensor | shape              | dtype   | of                                    |
| ------ | ------------------ | ------- | ------------------------------------- |
| sums   | [S, Hq, states, 2] | float32 | each part or group: highest and total |
| means  | [S, Hq, states, D] | float32 | the same, not divided                 |
"""

import torch
import triton
import triton.language as tl

#: Parts of a group, and the most that a program takes. Another number would be other bits too.
GROUP = 16
#: Groups that are merged at once. The same.
AT_ONCE = 8


@triton.jit
def merge_part(highest, total, mean, part_highest, part_total, part_mean):
    """The three values with a part's: [M], [M] and [M, D].

    Multiply-adds are spelt out, for the same bits in both kernels.
    """
    risen = tl.maximum(highest, part_highest)
    shrink = tl.exp2(highest - risen)
    weight = tl.exp2(part_highest - risen)
    total = tl.fma(total, shrink, part_total * weight)
    mean = tl.fma(mean, shrink[:, None], part_mean * weight[:, None])
    return risen, total, mean


@triton.jit(do_not_specialize=["num_states", "state_size", "group"])
def _merge_parts_kernel(
    sums_ptr,
    means_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    out_token,
    out_head,
    num_states,
    state_size,  # positions of a state: those of a part, or of a group
    group,  # states of a group: 1 if they are groups
    Hq: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    context = tl.load(context_lens_ptr + seq)
    token = tl.load(cu_seqlens_q_ptr + seq)
    if tl.load(cu_seqlens_q_ptr + seq + 1) - token != 1:
        return
    channels = tl.arange(0, BLOCK_D)
    inside = channels < D
    first = 0
    if WINDOW:
        first = tl.maximum(context - WINDOW, 0) // TILE * TILE // state_size
    end = tl.cdiv(context, state_size)
    all_highest = -1e30
    all_total = 0.0
    all_mean = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first // (group * AT_ONCE) * (group * AT_ONCE), end, group * AT_ONCE):
        groups = start + tl.arange(0, AT_ONCE) * group
        highest = tl.full([AT_ONCE], -1e30, tl.float32)
        total = tl.zeros([AT_ONCE], tl.float32)
        mean = tl.zeros([AT_ONCE, BLOCK_D], tl.float32)
        for step in tl.range(0, tl.minimum(group, end - start), num_stages=6):
            state = groups + step
            there = (state >= first) & (state < end)  # one that is not changes nothing
            place = (seq * Hq + head) * num_states + state
            highest, total, mean = merge_part(
                highest,
                total,
                mean,
                tl.load(sums_ptr + place * 2, mask=there, other=float("-inf")),
                tl.load(sums_ptr + place * 2 + 1, mask=there, other=0.0),
                tl.load(
                    means_ptr + place[:, None] * D + channels[None, :],
                    mask=there[:, None] & inside[None, :],
                    other=0.0,
                ),
            )
        risen = tl.maximum(all_highest, tl.max(highest, axis=0))
        shrink = tl.exp2(all_highest - risen)
        weights = tl.exp2(highest - risen)
        all_total = all_total * shrink + tl.sum(total * weights, axis=0)
        all_mean = all_mean * shrink + tl.sum(mean * weights[:, None], axis=0)
        all_highest = risen
    out = out_ptr + token.to(tl.int64) * out_token + head * out_head + channels
    tl.store(out, (all_mean / all_total).to(out_ptr.dtype.element_ty), mask=inside)


def merge_parts(
    sums: torch.Tensor,
    means: torch.Tensor,
    out: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    part: int,
    is_merged: bool,
    first_of: int,
    window: int,
) -> None:
    """Write the rows of chunks of one query to `out` [T, Hq, D].

    A state is of `part` positions, or if `is_merged` of a group; with a `window` other than 0 the
    first is that of the window's first position rounded down to a multiple of `first_of`.
    """
    num_seqs, num_heads, num_states, head_dim = means.shape
    _merge_parts_kernel[(num_heads, num_seqs)](
        sums,
        means,
        out,
        cu_seqlens_q,
        context_lens,
        *out.stride()[:2],
        num_states,
        part * GROUP if is_merged else part,
        1 if is_merged else GROUP,
        Hq=num_heads,
        D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        AT_ONCE=AT_ONCE,
        TILE=first_of,
        WINDOW=window,
        num_warps=4,
        enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
    )
