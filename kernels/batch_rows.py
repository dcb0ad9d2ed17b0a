"""The tensors of a step, made on the device from rows that stay there, in Triton.

For chunk s of row r = rows[s], which is tokens[r, computed[r] .. computed[r] + lengths[s] - 1],
at i = cu_seqlens_q[s] on:

    ids[i + j]          = tokens[r, p],  positions[i + j] = p,           p = computed[r] + j
    slots[i + j]        = tables[r, p // block_size] * block_size + p % block_size
    context_lens[s]     = computed[r] + lengths[s]
    block_tables[s]     = tables[r]
    last_tokens[s]      = i + lengths[s] - 1

| tensor              | shape   | dtype | strides |                                              |
| ------------------- | ------- | ----- | ------- | -------------------------------------------- |
| rows                | [S]     | int32 | dense   | sent each step; -1: padding, with length 0   |
| cu_seqlens_q        | [S + 1] | int32 | dense   | sent each step: prefix sums of the lengths   |
| tokens              | [R, L]  | int32 | dense   | resident: prompt and output of each row      |
| computed            | [R]     | int32 | dense   | resident: tokens whose keys are in the cache |
| tables              | [R, B]  | int32 | dense   | resident: blocks of each row                 |
| ids, positions      | [T]     | int64 | dense   | results; 0 in padding                        |
| slots               | [T]     | int64 | dense   | result; -1 in padding: stored nowhere        |
| context_lens        | [S]     | int32 | dense   | result; 0 in padding                         |
| block_tables        | [S, B]  | int32 | dense   | result                                       |
| last_tokens         | [S]     | int64 | dense   | result; 0 in padding                         |

T and S are those of the buffers, that is padded to the sizes that a CUDA graph was captured with;
what a step really has is read on the device.
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_contiguous, check_device, check_dtype, check_shape

_BLOCK = 256


# The counts change from step to step: specialised, each new kind would compile while serving.
@triton.jit(do_not_specialize=["S", "T"])
def _build_tokens_kernel(
    rows_ptr,
    cu_seqlens_q_ptr,
    tokens_ptr,
    computed_ptr,
    tables_ptr,
    ids_ptr,
    positions_ptr,
    slots_ptr,
    S,
    T,
    L,
    B,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + S
    span = S
    while span > 0:  # the chunk of each token: the first that ends behind it
        middle = (low + high) // 2
        end = tl.load(cu_seqlens_q_ptr + middle + 1, mask=middle < S, other=2147483647)
        is_behind = (end <= token) & (low < high)
        low = tl.where(is_behind, middle + 1, low)
        high = tl.where(is_behind, high, middle)
        span = span // 2
    is_real = inside & (low < S)
    row = tl.load(rows_ptr + low, mask=is_real, other=0).to(tl.int64)
    start = tl.load(cu_seqlens_q_ptr + low, mask=is_real, other=0)
    position = tl.load(computed_ptr + row, mask=is_real, other=0) + token - start
    ids = tl.load(tokens_ptr + row * L + position, mask=is_real, other=0)
    block = tl.load(tables_ptr + row * B + position // BLOCK_SIZE, mask=is_real, other=0)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(ids_ptr + token, ids.to(tl.int64), mask=inside)
    tl.store(positions_ptr + token, tl.where(is_real, position, 0).to(tl.int64), mask=inside)
    tl.store(slots_ptr + token, tl.where(is_real, slot, -1), mask=inside)


@triton.jit
def _build_chunks_kernel(
    rows_ptr,
    cu_seqlens_q_ptr,
    computed_ptr,
    tables_ptr,
    context_lens_ptr,
    block_tables_ptr,
    last_tokens_ptr,
    B,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + chunk).to(tl.int64)
    is_real = row >= 0
    row = tl.maximum(row, 0)
    end = tl.load(cu_seqlens_q_ptr + chunk + 1)
    length = end - tl.load(cu_seqlens_q_ptr + chunk)
    computed = tl.load(computed_ptr + row)
    tl.store(context_lens_ptr + chunk, tl.where(is_real, computed + length, 0))
    tl.store(last_tokens_ptr + chunk, tl.where(is_real, end - 1, 0).to(tl.int64))
    for start in range(0, B, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < B
        blocks = tl.load(tables_ptr + row * B + columns, mask=inside, other=0)
        tl.store(block_tables_ptr + chunk * B + columns, tl.where(is_real, blocks, 0), mask=inside)


@triton.jit
def _advance_kernel(
    rows_ptr,
    cu_seqlens_q_ptr,
    is_sampled_ptr,
    sampled_ptr,
    tokens_ptr,
    computed_ptr,
    L,
):
    chunk = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + chunk).to(tl.int64)
    if row >= 0:
        length = tl.load(cu_seqlens_q_ptr + chunk + 1) - tl.load(cu_seqlens_q_ptr + chunk)
        computed = tl.load(computed_ptr + row) + length
        tl.store(computed_ptr + row, computed)
        if (tl.load(is_sampled_ptr + chunk) != 0) & (computed < L):
            token = tl.maximum(tl.load(sampled_ptr + chunk), 0)
            tl.store(tokens_ptr + row * L + computed, token.to(tl.int32))


@triton.jit(do_not_specialize=["count"])
def _write_cells_kernel(memory_ptr, cells_ptr, values_ptr, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    cells = tl.load(cells_ptr + places, mask=inside, other=0)
    tl.store(memory_ptr + cells, tl.load(values_ptr + places, mask=inside), mask=inside)


def write_cells(memory: torch.Tensor, cells: torch.Tensor, values: torch.Tensor) -> None:
    """Set memory[cells[n]] = values[n], all int32 and of one dimension; no cell is there twice.

    Raises:
        ValueError: an argument of another kind.
    """
    tensors = {"memory": memory, "cells": cells, "values": values}
    check_shape("memory", memory, "N")
    check_shape("values", values, len(cells))
    for name, tensor in tensors.items():
        check_dtype(name, tensor, torch.int32)
    check_contiguous(**tensors)
    check_device(memory.device, **tensors)
    count = len(cells)
    if count:
        _write_cells_kernel[(triton.cdiv(count, _BLOCK),)](
            memory, cells, values, count, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
        )


def build_step(
    rows: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    tokens: torch.Tensor,
    computed: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
    ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    last_tokens: torch.Tensor,
) -> None:
    """Fill the six results of the table above.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    num_chunks, num_tokens = rows.shape[0], ids.shape[0]
    _check_resident(rows, cu_seqlens_q, tokens, computed)
    check_shape("tables", tables, tokens.shape[0], "B")
    width = tables.shape[1]
    check_shape("positions", positions, num_tokens)
    check_shape("slots", slots, num_tokens)
    check_shape("context_lens", context_lens, num_chunks)
    check_shape("block_tables", block_tables, num_chunks, width)
    check_shape("last_tokens", last_tokens, num_chunks)
    narrow = {"tables": tables, "context_lens": context_lens, "block_tables": block_tables}
    wide = {"ids": ids, "positions": positions, "slots": slots, "last_tokens": last_tokens}
    for tensors, dtype in ((narrow, torch.int32), (wide, torch.int64)):
        for name, tensor in tensors.items():
            check_dtype(name, tensor, dtype)
        check_contiguous(**tensors)
        check_device(rows.device, **tensors)
    if num_tokens:
        _build_tokens_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            rows,
            cu_seqlens_q,
            tokens,
            computed,
            tables,
            ids,
            positions,
            slots,
            num_chunks,
            num_tokens,
            tokens.shape[1],
            width,
            BLOCK_SIZE=block_size,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )
    if num_chunks:
        _build_chunks_kernel[(num_chunks,)](
            rows,
            cu_seqlens_q,
            computed,
            tables,
            context_lens,
            block_tables,
            last_tokens,
            width,
            BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
            num_warps=1,
            enable_fp_fusion=True,
        )


def advance(
    rows: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    is_sampled: torch.Tensor,
    sampled: torch.Tensor,
    *,
    tokens: torch.Tensor,
    computed: torch.Tensor,
) -> None:
    """Count each chunk as computed, and append `sampled` [S] where `is_sampled` [S] is not 0.

    The next step then finds its ids without the host having seen them. Where no
    token could be drawn, -1, it finds 0: an id like any other, in a row that has ended.
    `is_sampled` is int32, `sampled` int64.

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    _check_resident(rows, cu_seqlens_q, tokens, computed)
    num_chunks = rows.shape[0]
    given = {"is_sampled": (is_sampled, torch.int32), "sampled": (sampled, torch.int64)}
    for name, (tensor, dtype) in given.items():
        check_shape(name, tensor, num_chunks)
        check_dtype(name, tensor, dtype)
        check_contiguous(**{name: tensor})
        check_device(rows.device, **{name: tensor})
    if num_chunks:
        _advance_kernel[(num_chunks,)](
            rows,
            cu_seqlens_q,
            is_sampled,
            sampled,
            tokens,
            computed,
            tokens.shape[1],
            num_warps=1,
            enable_fp_fusion=True,
        )


def _check_resident(
    rows: torch.Tensor, cu_seqlens_q: torch.Tensor, tokens: torch.Tensor, computed: torch.Tensor
) -> None:
    check_shape("rows", rows, "S")
    check_shape("cu_seqlens_q", cu_seqlens_q, rows.shape[0] + 1)
    check_shape("tokens", tokens, "R", "L")
    check_shape("computed", computed, tokens.shape[0])
    tensors = {"rows": rows, "cu_seqlens_q": cu_seqlens_q, "tokens": tokens, "computed": computed}
    for name, tensor in tensors.items():
        check_dtype(name, tensor, torch.int32)
    check_contiguous(**tensors)
    check_device(rows.device, **tensors)
