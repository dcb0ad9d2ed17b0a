"""Logits that requests change before a token is drawn: biases, what may not be drawn; in Triton.

With e a number of `places` and r = rows[places[e]], for the first counts[r] cells j of row r:

    add_cells        logits[places[e], tokens[r, j]] += values[r, j]
    set_cells        logits[places[e], tokens[r, j]]  = value
    keep_allowed     logits[places[e], t] = -inf   where bit t of words[e] is 0

| tensor  | shape  | dtype   | strides |                                                           |
| ------- | ------ | ------- | ------- | --------------------------------------------------------- |
| logits  | [S, V] | float32 | rows, 1 | changed                                                   |
| places  | [E]    | int32   | dense   | rows of logits, each once                                 |
| rows    | [S]    | int32   | dense   |                                                           |
| counts  | [R]    | int32   | dense   | resident: cells of each row                               |
| tokens  | [R, M] | int32   | dense   | resident: in a row each once; V or more is none of them   |
| values  | [R, M] | float32 | dense   | resident                                                  |
| words   | [E, W] | int32   | dense   | bit t % 32 of word t // 32, from the lowest; W >= V / 32  |
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import (
    check_contiguous,
    check_device,
    check_dtype,
    check_rows,
    check_shape,
)

_BLOCK_CELLS, _BLOCK_TOKENS = 128, 2048


@triton.jit
def _cells_kernel(
    logits_ptr,
    places_ptr,
    rows_ptr,
    counts_ptr,
    tokens_ptr,
    values_ptr,
    value,
    logits_row,
    V,
    M,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.load(places_ptr + tl.program_id(0)).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    count = tl.load(counts_ptr + row)
    for start in range(0, count, BLOCK):
        cells = start + tl.arange(0, BLOCK)
        inside = cells < count
        tokens = tl.load(tokens_ptr + row * M + cells, mask=inside, other=0)
        inside = inside & (tokens < V)
        at = logits_ptr + place * logits_row + tokens
        if ADD:
            values = tl.load(values_ptr + row * M + cells, mask=inside, other=0.0)
            values += tl.load(at, mask=inside, other=0.0)
        else:
            values = tl.zeros([BLOCK], tl.float32) + value
        tl.store(at, values, mask=inside)


@triton.jit
def _allowed_kernel(
    logits_ptr,
    places_ptr,
    words_ptr,
    logits_row,
    V,
    W,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + number).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    words = tl.load(words_ptr + number * W + (columns >> 5), mask=inside, other=-1)
    is_ruled_out = ((words >> (columns & 31)) & 1) == 0
    at = logits_ptr + place * logits_row + columns
    tl.store(at, tl.full([BLOCK], float("-inf"), tl.float32), mask=inside & is_ruled_out)


def add_cells(
    logits: torch.Tensor,
    places: torch.Tensor,
    *,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Add as in the table above.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    _check_cells(logits, places, rows, counts, tokens)
    check_shape("values", values, *tokens.shape)
    check_dtype("values", values, torch.float32)
    check_contiguous(values=values)
    check_device(logits.device, values=values)
    _edit_cells(logits, places, rows, counts, tokens, values, 0.0, is_added=True)


def set_cells(
    logits: torch.Tensor,
    places: torch.Tensor,
    value: float,
    *,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Set to `value` as in the table above.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    _check_cells(logits, places, rows, counts, tokens)
    _edit_cells(logits, places, rows, counts, tokens, logits, value, is_added=False)


def keep_allowed(logits: torch.Tensor, places: torch.Tensor, words: torch.Tensor) -> None:
    """Rule out as in the table above.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    _check_places(logits, places)
    check_shape("words", words, len(places), "W")
    check_dtype("words", words, torch.int32)
    check_contiguous(words=words)
    check_device(logits.device, words=words)
    vocabulary, width = logits.shape[1], words.shape[1]
    if 32 * width < vocabulary:
        raise ValueError(f"words: expected a bit for each of {vocabulary}, got {32 * width}")
    if len(places):
        _allowed_kernel[(len(places), triton.cdiv(vocabulary, _BLOCK_TOKENS))](
            logits,
            places,
            words,
            logits.stride(0),
            vocabulary,
            width,
            BLOCK=_BLOCK_TOKENS,
            num_warps=4,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )


def _edit_cells(
    logits: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    values: torch.Tensor,
    value: float,
    *,
    is_added: bool,
) -> None:
    if len(places):
        _cells_kernel[(len(places),)](
            logits,
            places,
            rows,
            counts,
            tokens,
            values,
            value,
            logits.stride(0),
            logits.shape[1],
            tokens.shape[1],
            ADD=is_added,
            BLOCK=_BLOCK_CELLS,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _check_places(logits: torch.Tensor, places: torch.Tensor) -> None:
    check_shape("logits", logits, "S", "V")
    check_dtype("logits", logits, torch.float32)
    check_rows(logits=logits)
    check_shape("places", places, "E")
    check_dtype("places", places, torch.int32)
    check_contiguous(places=places)
    check_device(logits.device, places=places)


def _check_cells(
    logits: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    _check_places(logits, places)
    check_shape("rows", rows, len(logits))
    check_shape("tokens", tokens, "R", "M")
    check_shape("counts", counts, len(tokens))
    dense = {"rows": rows, "counts": counts, "tokens": tokens}
    for name, tensor in dense.items():
        check_dtype(name, tensor, torch.int32)
    check_contiguous(**dense)
    check_device(logits.device, **dense)
