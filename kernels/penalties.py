"""Penalties for the tokens so far, on the device from the rows that stay there, in Triton.

For place e, which is row r = rows[e] with n = lengths[places[e]] tokens, and for each token t of
tokens[r, 0 .. n - 1], with c the times that it is in tokens[r, prompts[r] .. n - 1]:

    z    = z / repetition[r] if z > 0 else z * repetition[r]          z = logits[places[e], t]
    z    = z - c * frequency[r]
    z    = z - presence[r]    where c > 0

| tensor                          | shape  | dtype   | strides |                               |
| ------------------------------- | ------ | ------- | ------- | ----------------------------- |
| logits                          | [S, V] | float32 | rows, 1 | changed                       |
| places                          | [E]    | int32   | dense   | rows of logits, each once     |
| counted                         | [E]    | int32   | dense   | tokens whose counts are there |
| rows                            | [S]    | int32   | dense   |                               |
| lengths                         | [S]    | int32   | dense   |                               |
| tokens                          | [R, L] | int32   | dense   | resident: prompt and output   |
| counts                          | [R, L] | int32   | dense   | resident, changed: see below  |
| prompts                         | [R]    | int32   | dense   | resident: lengths             |
| repetition, presence, frequency | [R]    | float32 | dense   | resident                      |

counts[r, i] is c for t = tokens[r, i] if that is where t is first, else -1: a function of the
tokens alone, kept from step to step, so that a step looks at each old token once and not at every
pair of them. So a decode step reads 8 n bytes of a row and as many logits as it has distinct
tokens; counts as wide as the vocabulary would be 600 KB of a row at 152k tokens, cleared and read.
All pairs are compared once, when a sequence comes: by the rates of an H100 in 15 us for 4,096
tokens, 130 us for 32k. The one token of a decode step is compared with 1,024 at a time.

A program has a block of a row's positions, and changes the logits of those that are first there:
no token has two, so nothing is written twice. Each product is rounded before it is subtracted, as
on a CPU.
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

_BLOCK = 256
#: Tokens that are compared with a block at a time.
_ABREAST = 16
#: So many new tokens of a block are compared one by one, with as many at a time.
_FEW, _WIDE = 4, 1024


@triton.jit
def _penalize_kernel(
    logits_ptr,
    places_ptr,
    counted_ptr,
    rows_ptr,
    lengths_ptr,
    tokens_ptr,
    counts_ptr,
    prompts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    logits_row,
    L,
    BLOCK: tl.constexpr,
    ABREAST: tl.constexpr,
    FEW: tl.constexpr,
    WIDE: tl.constexpr,
):
    first = tl.program_id(1) * BLOCK
    place = tl.load(places_ptr + tl.program_id(0)).to(tl.int64)
    counted = tl.load(counted_ptr + tl.program_id(0))
    row = tl.load(rows_ptr + place).to(tl.int64)
    length = tl.load(lengths_ptr + place)
    if first < length:
        prompt = tl.load(prompts_ptr + row)
        mine = first + tl.arange(0, BLOCK)
        inside = mine < length
        token = tl.load(tokens_ptr + row * L + mine, mask=inside, other=-1)
        count = tl.load(counts_ptr + row * L + mine, mask=mine < counted, other=0)
        abreast = tl.arange(0, ABREAST)
        # Of new tokens here, those that are not the first are none.
        new = tl.maximum(first, counted)
        end = tl.minimum(first + BLOCK, length)
        if new < end and end - new <= FEW:  # while it decodes: one token against all before it
            for position in range(new, end):
                one = tl.load(tokens_ptr + row * L + position)
                seen = tl.zeros([WIDE], tl.int32)
                for start in range(0, position, WIDE):
                    others = start + tl.arange(0, WIDE)
                    other = tl.load(tokens_ptr + row * L + others, mask=others < position, other=-2)
                    seen |= (other == one).to(tl.int32)
                count = tl.where((mine == position) & (tl.max(seen, axis=0) > 0), -1, count)
        elif new < end:
            found = tl.zeros([BLOCK, ABREAST], tl.int32)
            for start in range(0, end, ABREAST):
                others = start + abreast
                other = tl.load(tokens_ptr + row * L + others, mask=others < length, other=-2)
                is_before = others[None, :] < mine[:, None]
                found |= ((token[:, None] == other[None, :]) & is_before).to(tl.int32)
            is_repeated = (tl.max(found, axis=1) > 0) & (mine >= counted)
            count = tl.where(is_repeated, -1, count)
        found = tl.zeros([BLOCK, ABREAST], tl.int32)
        for start in range(tl.maximum(counted, prompt), length, ABREAST):
            others = start + abreast
            other = tl.load(tokens_ptr + row * L + others, mask=others < length, other=-2)
            found += (token[:, None] == other[None, :]).to(tl.int32)
        is_first = inside & (count >= 0)
        count = tl.where(is_first, count + tl.sum(found, axis=1), -1)
        tl.store(counts_ptr + row * L + mine, count, mask=inside)

        at = logits_ptr + place * logits_row + token
        logits = tl.load(at, mask=is_first, other=0.0)
        repetition = tl.load(repetition_ptr + row)
        divided = tl.div_rn(logits, repetition)
        logits = tl.where(logits > 0.0, divided, logits * repetition)
        logits = logits - count.to(tl.float32) * tl.load(frequency_ptr + row)
        presence = tl.load(presence_ptr + row)
        tl.store(at, tl.where(count > 0, logits - presence, logits), mask=is_first)


def penalize(
    logits: torch.Tensor,
    places: torch.Tensor,
    counted: torch.Tensor,
    *,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    prompts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Change `logits` as in the table above; no length of a place is above `longest`.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    check_shape("logits", logits, "S", "V")
    check_dtype("logits", logits, torch.float32)
    check_rows(logits=logits)
    num_rows = len(tokens)
    whole: dict[str, tuple[torch.Tensor, int | str]] = {
        "places": (places, "E"),
        "counted": (counted, len(places)),
        "rows": (rows, len(logits)),
        "lengths": (lengths, len(logits)),
        "prompts": (prompts, num_rows),
    }
    floats = {"repetition": repetition, "presence": presence, "frequency": frequency}
    for name, (tensor, size) in whole.items():
        check_shape(name, tensor, size)
        check_dtype(name, tensor, torch.int32)
    for name, tensor in floats.items():
        check_shape(name, tensor, num_rows)
        check_dtype(name, tensor, torch.float32)
    check_shape("tokens", tokens, "R", "L")
    check_shape("counts", counts, *tokens.shape)
    check_dtype("tokens", tokens, torch.int32)
    check_dtype("counts", counts, torch.int32)
    dense = {name: tensor for name, (tensor, _) in whole.items()} | floats
    dense |= {"tokens": tokens, "counts": counts}
    check_contiguous(**dense)
    check_device(logits.device, **dense)
    if len(places) and longest > 0:
        _penalize_kernel[(len(places), triton.cdiv(longest, _BLOCK))](
            logits,
            places,
            counted,
            rows,
            lengths,
            tokens,
            counts,
            prompts,
            repetition,
            presence,
            frequency,
            logits.stride(0),
            tokens.shape[1],
            BLOCK=_BLOCK,
            ABREAST=_ABREAST,
            FEW=_FEW,
            WIDE=_WIDE,
            num_warps=4,
            enable_fp_fusion=False,  # a product that is not rounded gives other bits than a CPU's
        )
