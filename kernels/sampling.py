"""One token per row of logits, drawn without a sort, in Triton.

    x[t]     = (logits[t] - max logits) / max(temperature, 1e-6)
    kept     = the tokens that top_k, then top_p of what is left, and min_p leave
    token    = argmax over kept of x[t] + noise(seed, position, t);   temperature 0: argmax logits
    logprob  = logits[token] - log sum exp(logits)

| tensor          | shape  | dtype         | strides | meaning                                     |
| --------------- | ------ | ------------- | ------- | ------------------------------------------- |
| logits          | [R, V] | float32       | rows, 1 | not changed                                 |
| temperature     | [R]    | float32       | 1       | 0 is greedy                                 |
| top_k           | [R]    | int32         | 1       | 0: all                                      |
| top_p, min_p    | [R]    | float32       | 1       | 1 and 0: all                                |
| seeds           | [R]    | int64         | 1       | the seed's 64 bits                          |
| positions       | [R]    | int64         | 1       | of the token that is drawn                  |
| tokens          | [R]    | int64         | 1       | result; the lowest of those that tie        |
| logprobs        | [R]    | float32       | 1       | result                                      |

The noise is standard Gumbel noise from 23 bits of a counter hash: splitmix64's finaliser of seed
and position gives two words, MurmurHash3's 32-bit finaliser mixes them with the token id. Those
bits are the same on every device; the two logarithms after them are rounded by each device's own.

What is kept is always everything down to some x, so a threshold is searched for, not an order:
x <= 0, so its bits without the sign grow as x falls, and the 32 bits of the threshold are found
from the top, two in each of 16 passes over the row, by counting (top_k) or by adding up
probabilities (top_p). Tokens that tie with the last one kept are kept.

One program per row. Memory-bound: the row is read twice, the second time and in the passes of a
search mostly from the L2 cache.
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

_BLOCK = 4096


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
def _scaled(row, columns, V, highest, temperature):
    """The x of these columns, and its bits without the sign, which grow as x falls."""
    logits = tl.load(row + columns, mask=columns < V, other=float("-inf"))
    x = tl.div_rn(logits - highest, temperature)
    return x, tl.abs(x).to(tl.uint32, bitcast=True)


@triton.jit
def _mass(row, V, highest, temperature, limit, BLOCK: tl.constexpr):
    """The sum of exp(x) where the bits are below `limit`."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x, bits = _scaled(row, start + tl.arange(0, BLOCK), V, highest, temperature)
        sums += tl.where(bits < limit, tl.exp(x), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _search(row, V, highest, temperature, limit, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The least bits up to which `wanted` tokens lie, or MASS: as much of exp(x).

    Bits from `limit` on are not counted. Returns the bits [1], all ones if there is not as much,
    and how much lies strictly before them.
    """
    one = tl.full([1], 1, tl.uint32)
    shift = tl.full([1], 30, tl.uint32)
    found = tl.zeros([1], tl.uint32)
    before = wanted * 0.0
    for _ in range(16):
        reach = (one << shift) - 1
        first = found | reach
        second = first | (one << shift)
        third = found | (one << (shift + 1)) | reach
        sums_1 = tl.zeros([BLOCK], tl.float32)
        sums_2 = tl.zeros([BLOCK], tl.float32)
        sums_3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x, bits = _scaled(row, columns, V, highest, temperature)
            weight = tl.where((columns < V) & (bits < limit), 1.0, 0.0)
            if MASS:
                weight = weight * tl.exp(x)
            sums_1 += tl.where(bits <= first, weight, 0.0)
            sums_2 += tl.where(bits <= second, weight, 0.0)
            sums_3 += tl.where(bits <= third, weight, 0.0)
        to_first = tl.sum(sums_1, axis=0)
        to_second = tl.sum(sums_2, axis=0)
        to_third = tl.sum(sums_3, axis=0)
        if to_first < wanted:
            before = to_first
            found += one << shift
            if to_second < wanted:
                before = to_second
                found += one << shift
                if to_third < wanted:
                    before = to_third
                    found += one << shift
        shift -= 2
    return found, before


@triton.jit
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    tokens_ptr,
    logprobs_ptr,
    logits_row,
    V,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = logits_ptr + place * logits_row
    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < V, other=float("-inf"))
        lanes = tl.maximum(lanes, logits)
    highest = tl.max(lanes, axis=0)

    asked = tl.load(temperature_ptr + place)
    temperature = tl.maximum(asked, 1e-6)
    top_k = tl.load(top_k_ptr + place)
    top_p = tl.load(top_p_ptr + place)
    min_p = tl.load(min_p_ptr + place)
    last = tl.full([1], 0xFFFFFFFF, tl.uint32)  # the bits of the last token that is kept
    if asked > 0.0:
        is_ranked = (top_k > 0) & (top_k < V)
        k = top_k.to(tl.float32)
        before = k
        if is_ranked:
            last, before = _search(row, V, highest, temperature, last, k, False, BLOCK)
        if top_p < 1.0:
            total = _mass(row, V, highest, temperature, last, BLOCK)
            if is_ranked:  # of the tokens that tie with the last, as many as there is room for
                total += (k - before) * tl.sum(tl.exp(-last.to(tl.float32, bitcast=True)), axis=0)
            found, before = _search(row, V, highest, temperature, last, top_p * total, True, BLOCK)
            last = tl.minimum(last, found)
    least = float("-inf")
    if min_p > 0.0:
        least = tl.log(min_p)

    one = tl.zeros([1], tl.int64)
    seed = tl.load(seeds_ptr + place + one).to(tl.uint64, bitcast=True)
    position = tl.load(positions_ptr + place + one).to(tl.uint64, bitcast=True)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_column = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(row + columns, mask=columns < V, other=float("-inf"))
        sums += tl.exp(logits - highest)
        score = logits
        if asked > 0.0:
            x, bits = _scaled(row, columns, V, highest, temperature)
            noise = _gumbel(noise_bits(seed, position, columns.to(tl.uint32)))
            kept = (bits <= last) & (x >= least) & (columns < V)
            score = tl.where(kept, x + noise, float("-inf"))
        is_better = score > best
        best = tl.where(is_better, score, best)
        best_column = tl.where(is_better, columns, best_column)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, best_column, V), axis=0)
    logprob = tl.load(row + token) - highest - tl.log(tl.sum(sums, axis=0))
    tl.store(tokens_ptr + place, token.to(tl.int64))
    tl.store(logprobs_ptr + place, logprob)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw as in the table above; returns the tokens and their log probabilities, [R] each.

    Raises:
        ValueError: an argument that does not fit the table.
    """
    check_shape("logits", logits, "R", "V")
    check_dtype("logits", logits, torch.float32)
    check_rows(logits=logits)
    columns = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "seeds": (seeds, torch.int64),
        "positions": (positions, torch.int64),
    }
    num_rows, vocabulary = logits.shape
    for name, (column, dtype) in columns.items():
        check_shape(name, column, num_rows)
        check_dtype(name, column, dtype)
        check_contiguous(**{name: column})
        check_device(logits.device, **{name: column})
    if not vocabulary:
        raise ValueError("logits: expected at least one token, got none")
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _sample_kernel[(num_rows,)](
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds,
            positions,
            tokens,
            logprobs,
            logits.stride(0),
            vocabulary,
            BLOCK=min(_BLOCK, max(32, triton.next_power_of_2(vocabulary))),
            num_warps=8,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )
    return tokens, logprobs
