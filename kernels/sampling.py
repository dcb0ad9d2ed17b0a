"""One token per row of logits, drawn without a sort, in Triton.

    x[t]     = (logits[t] - max logits) / max(temperature, 1e-6)
    kept     = the tokens that top_k, then top_p of what is left, and min_p leave
    token    = argmax over kept of x[t] + noise(seed, position, t);   temperature 0: argmax logits
               -1 where the highest logit is not finite, or one is no number
    logprob  = logits[token] - log sum exp(logits)

| tensor          | shape  | dtype            | strides | meaning                                  |
| --------------- | ------ | ---------------- | ------- | ---------------------------------------- |
| logits          | [R, V] | float32, 16 bits | rows, 1 | not changed; computed in float32         |
| rows            | [R]    | int32            | 1       | where the parameters of each are         |
| temperature     | [N]    | float32          | 1       | 0 is greedy                              |
| top_k           | [N]    | int32            | 1       | 0: all                                   |
| top_p, min_p    | [N]    | float32          | 1       | 1 and 0: all                             |
| seeds           | [N]    | int64            | 1       | the seed's 64 bits                       |
| positions       | [R]    | int32, int64     | 1       | of the token that is drawn               |
| tokens          | [R]    | int64            | 1       | result; the lowest of those that tie     |
| logprobs        | [R]    | float32          | 1       | result; not a number where token is -1   |
| totals          | [R]    | float32          | 1       | result: log sum exp(logits), likewise    |

The noise is standard Gumbel noise from 23 bits of a counter hash: splitmix64's finaliser of seed
and position gives two words, MurmurHash3's 32-bit finaliser mixes them with the token id. Those
bits are the same on every device; the two logarithms after them are rounded by each device's own.

What is kept is always everything down to some x, so a threshold is searched for, not an order
(`kernels/thresholds.py`). Tokens that tie with the last one kept are kept.

    highest      a program for each part of a row   its highest logit
    thresholds   only where they are asked for
    draw         a program for each part of a row   its best token, its sum of exp(logits - max)
    merge        a program for each row             token and log probability

Parts have a fixed number of tokens, so a row's sums do not depend on its batch. Memory-bound: the
row is read twice, by as many programs as it has parts: one program a row would leave all but one
processor idle at batch 1.
"""

from typing import NamedTuple

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
from tokenmill.kernels.thresholds import find_thresholds, highest_of

#: Tokens of a part.
PART = 4096
#: Noise is between -2.82 and 16.64: what lies lower cannot come before the highest, so no noise is
#: made for a part that has nothing higher.
_WORTH = -19.5


@triton.jit
def _mix64(value):
    """splitmix64's step and finaliser on uint64."""
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _mix32(value):
    """MurmurHash3's finaliser on uint32."""
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    return value ^ (value >> 16)


@triton.jit
def noise_bits(seed, position, token):
    """The 32 random bits of (seed, position) uint64 and token ids uint32."""
    key = _mix64(_mix64(seed) + position * 0x9E3779B97F4A7C15)
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    return _mix32(_mix32(token ^ low) + high)


@triton.jit
def _gumbel(bits):
    """Standard Gumbel noise; 23 bits and a half are exact, so it is always finite."""
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def _highest_kernel(logits_ptr, highest_ptr, last_ptr, logits_row, V, P, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    row = logits_ptr + place * logits_row
    logits = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits == logits, logits, float("inf"))  # no number: as if it were infinite
    tl.store(highest_ptr + place * P + part, tl.max(logits, axis=0))
    if part == 0:
        tl.store(last_ptr + place, -1)  # all bits: nothing is left out, unless a search says so


@triton.jit
def _draw_kernel(
    logits_ptr,
    highest_ptr,
    last_ptr,
    rows_ptr,
    temperature_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    tokens_ptr,
    sums_ptr,
    logits_row,
    V,
    P,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WORTH: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = logits_ptr + place * logits_row
    given = tl.load(rows_ptr + place)
    asked = tl.load(temperature_ptr + given)
    highest = highest_of(highest_ptr, place, P, BLOCK_P)
    if tl.abs(highest) < float("inf"):
        columns = part * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        sums = tl.sum(tl.exp(logits - highest), axis=0)
        score = logits
        if asked > 0.0:
            score = tl.full([BLOCK], float("-inf"), tl.float32)
            temperature = tl.maximum(asked, 1e-6)
            part_highest = tl.load(highest_ptr + place * P + part)
            if tl.div_rn(part_highest - highest, temperature) > WORTH:
                min_p = tl.load(min_p_ptr + given)
                least = float("-inf")
                if min_p > 0.0:
                    least = tl.log(min_p)
                one = tl.zeros([1], tl.int64)
                last = tl.load(last_ptr + place + one).to(tl.uint32, bitcast=True)
                seed = tl.load(seeds_ptr + given + one).to(tl.uint64, bitcast=True)
                position = tl.load(positions_ptr + place + one).to(tl.int64)
                position = position.to(tl.uint64, bitcast=True)
                x = tl.div_rn(logits - highest, temperature)  # as `thresholds.scaled`
                bits = tl.abs(x).to(tl.uint32, bitcast=True)
                noise = _gumbel(noise_bits(seed, position, columns.to(tl.uint32)))
                kept = (bits <= last) & (x >= least)
                score = tl.where(kept & (columns < V), x + noise, float("-inf"))
        best = tl.max(score, axis=0)
        token = tl.min(tl.where(score == best, columns, V - 1), axis=0)
        tl.store(best_ptr + place * P + part, best)
        tl.store(tokens_ptr + place * P + part, token)
        tl.store(sums_ptr + place * P + part, sums)


@triton.jit
def _merge_kernel(
    logits_ptr,
    highest_ptr,
    best_ptr,
    found_ptr,
    sums_ptr,
    tokens_ptr,
    logprobs_ptr,
    totals_ptr,
    logits_row,
    V,
    P,
    BLOCK_P: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    highest = highest_of(highest_ptr, place, P, BLOCK_P)
    if tl.abs(highest) < float("inf"):
        parts = tl.arange(0, BLOCK_P)
        at = place * P + parts
        inside = parts < P
        best = tl.load(best_ptr + at, mask=inside, other=float("-inf"))
        found = tl.load(found_ptr + at, mask=inside, other=0)
        sums = tl.load(sums_ptr + at, mask=inside, other=0.0)
        top = tl.max(best, axis=0)
        token = tl.min(tl.where(inside & (best == top), found, V - 1), axis=0)
        logit = tl.load(logits_ptr + place * logits_row + token).to(tl.float32)
        tl.store(tokens_ptr + place, token.to(tl.int64))
        total = highest + tl.log(tl.sum(sums, axis=0))
        tl.store(logprobs_ptr + place, logit - total)
        tl.store(totals_ptr + place, total)
    else:
        tl.store(tokens_ptr + place, tl.full([], -1, tl.int64))
        tl.store(logprobs_ptr + place, float("nan"))
        tl.store(totals_ptr + place, float("nan"))


class Drawn(NamedTuple):
    """Of each row of logits, [R]: its token, how likely that is, and log sum exp of the logits."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    totals: torch.Tensor


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor | None = None,
    is_filtered: bool = True,
) -> Drawn:
    """Draw as in the table above.

    Without `rows` the parameters are those of the rows in their order. Where it is known that
    nobody has top_k or top_p, `is_filtered` False saves the search.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    check_shape("logits", logits, "R", "V")
    check_floating("logits", logits)
    check_rows(logits=logits)
    num_rows, vocabulary = logits.shape
    device = logits.device
    if rows is None:
        rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        check_shape("temperature", temperature, num_rows)
    columns = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "seeds": (seeds, torch.int64),
    }
    for name, (column, dtype) in columns.items():
        check_shape(name, column, *temperature.shape)
        check_dtype(name, column, dtype)
    check_shape("temperature", temperature, "N")
    check_shape("rows", rows, num_rows)
    check_dtype("rows", rows, torch.int32)
    check_shape("positions", positions, num_rows)
    check_dtype("positions", positions, torch.int32, torch.int64)
    tensors = {name: column for name, (column, _) in columns.items()}
    tensors |= {"rows": rows, "positions": positions}
    check_contiguous(**tensors)
    check_device(device, **tensors)
    if not vocabulary:
        raise ValueError("logits: expected at least one token, got none")
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    drawn = Drawn(tokens, logprobs, torch.empty_like(logprobs))
    if not num_rows:
        return drawn
    block = min(PART, max(32, triton.next_power_of_2(vocabulary)))
    num_parts = triton.cdiv(vocabulary, block)
    sizes = {"BLOCK": block, "BLOCK_P": triton.next_power_of_2(num_parts)}
    # Said outright, since Triton 3.10 changes the default.
    options = {"num_warps": 8, "enable_fp_fusion": True}
    # Each with memory of its own: addresses that are aligned otherwise would be compiled for anew.
    highest, best, sums = (torch.empty(num_rows, num_parts, device=device) for _ in range(3))
    found = torch.empty(num_rows, num_parts, dtype=torch.int32, device=device)
    last = torch.empty(num_rows, dtype=torch.int32, device=device)
    shape = (logits.stride(0), vocabulary, num_parts)
    grid = (num_rows, num_parts)
    _highest_kernel[grid](
        logits, highest, last, *shape, BLOCK=block, **(options | {"num_warps": 4})
    )
    if is_filtered:
        find_thresholds(
            logits,
            highest,
            rows,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            last=last,
            part=block,
        )
    _draw_kernel[grid](
        logits,
        highest,
        last,
        rows,
        temperature,
        min_p,
        seeds,
        positions,
        best,
        found,
        sums,
        *shape,
        **sizes,
        WORTH=_WORTH,
        **options,
    )
    _merge_kernel[(num_rows,)](
        logits,
        highest,
        best,
        found,
        sums,
        *drawn,
        *shape,
        BLOCK_P=sizes["BLOCK_P"],
        **(options | {"num_warps": 1}),
    )
    return drawn
