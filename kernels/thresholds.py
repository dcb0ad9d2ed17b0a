"""How far down top_k and top_p keep tokens of a row of logits, without a sort, in Triton.

    x[t]  = (logits[t] - max logits) / max(temperature, 1e-6)
    last  = the least bits of |x| up to which top_k tokens lie; if top_p is below 1, at most those
            up to which top_p of the sum of exp(x) over these lies

x <= 0, so its bits without the sign grow as x falls. Of the tokens that tie with the last of the
top_k, the sum has as many as there is room for.

    levels    a program for each part of a row   how many tokens, and how much of exp(x), lie down
                                                 to x = -1, -2, .., -15 and at all
    gather    a program for each part of a row   the bits of the tokens down to the level that is
                                                 enough, side by side
    search    a program for each row             the threshold among these

The 32 bits of a threshold are found from the top, two in each of 16 passes, by counting or adding
up. A few hundred tokens lie down to the level as a rule, so the passes find them in the first-level
cache: over the whole row, 16 passes for each of both took as long as a decode step. Where no level
is enough, the candidates are all tokens. Rows that nobody filters are left alone.

| tensor                    | shape  | dtype            | strides |                             |
| ------------------------- | ------ | ---------------- | ------- | --------------------------- |
| logits                    | [R, V] | float32, 16 bits | rows, 1 |                             |
| highest                   | [R, P] | float32          | dense   | of each part                |
| rows                      | [R]    | int32            | dense   | where the parameters are    |
| temperature, top_k, top_p | [N]    | float32, int32   | dense   |                             |
| last                      | [R]    | int32            | dense   | result, where there is one   |
"""

import torch
import triton
import triton.language as tl

#: Levels, of which the last is everything.
_LEVELS = 16
#: Candidates that a pass of a search looks at, at a time.
_BLOCK = 2048
#: What sums that are rounded in another order may miss, and more.
_MARGIN = 1.00001


@triton.jit
def highest_of(highest_ptr, place, P, BLOCK_P: tl.constexpr):
    """Of a row, from its parts; infinite if one of its logits is, or is no number."""
    parts = tl.arange(0, BLOCK_P)
    found = tl.load(highest_ptr + place * P + parts, mask=parts < P, other=float("-inf"))
    return tl.max(found, axis=0)


@triton.jit
def scaled(row, columns, V, highest, temperature):
    """The x of these columns."""
    logits = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    return tl.div_rn(logits - highest, tl.maximum(temperature, 1e-6))


@triton.jit
def _is_filtered(temperature, top_k, top_p, V, highest):
    is_ranked = (top_k > 0) & (top_k < V)
    return (temperature > 0.0) & (is_ranked | (top_p < 1.0)) & (tl.abs(highest) < float("inf"))


@triton.jit
def _levels_kernel(
    logits_ptr,
    highest_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,
    masses_ptr,
    logits_row,
    V,
    P,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LEVELS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = logits_ptr + place * logits_row
    given = tl.load(rows_ptr + place)
    temperature = tl.load(temperature_ptr + given)
    top_k, top_p = tl.load(top_k_ptr + given), tl.load(top_p_ptr + given)
    highest = highest_of(highest_ptr, place, P, BLOCK_P)
    if _is_filtered(temperature, top_k, top_p, V, highest):
        columns = part * BLOCK + tl.arange(0, BLOCK)
        x = scaled(row, columns, V, highest, temperature)
        weights = tl.exp(x)
        depths = tl.where(columns < V, -x, float("nan"))  # which lies nowhere
        at = (place * P + part) * LEVELS
        for level in tl.static_range(LEVELS):
            limit = level + 1.0 if level < LEVELS - 1 else float("inf")
            count = tl.sum(tl.where(depths <= limit, 1.0, 0.0), axis=0)
            mass = tl.sum(tl.where(depths <= limit, weights, 0.0), axis=0)
            tl.store(counts_ptr + at + level, count)
            tl.store(masses_ptr + at + level, mass)


@triton.jit
def _gather_kernel(
    logits_ptr,
    highest_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,
    masses_ptr,
    candidates_ptr,
    sizes_ptr,
    totals_ptr,
    logits_row,
    V,
    P,
    margin,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LEVELS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = logits_ptr + place * logits_row
    given = tl.load(rows_ptr + place)
    temperature = tl.load(temperature_ptr + given)
    top_k, top_p = tl.load(top_k_ptr + given), tl.load(top_p_ptr + given)
    highest = highest_of(highest_ptr, place, P, BLOCK_P)
    if _is_filtered(temperature, top_k, top_p, V, highest):
        levels, parts = tl.arange(0, LEVELS), tl.arange(0, BLOCK_P)
        at = (place * P + parts[:, None]) * LEVELS + levels[None, :]
        inside = (parts < P)[:, None] & (levels >= 0)[None, :]
        counts = tl.load(counts_ptr + at, mask=inside, other=0.0)
        masses = tl.sum(tl.load(masses_ptr + at, mask=inside, other=0.0), axis=0)
        total = tl.max(masses, axis=0)  # that of the last level
        is_enough = masses >= top_p * total * margin
        if (top_k > 0) & (top_k < V):
            is_enough = tl.sum(counts, axis=0) >= top_k.to(tl.float32)
        level = tl.min(tl.where(is_enough, levels, LEVELS - 1), axis=0)
        chosen = tl.sum(tl.where(levels[None, :] == level, counts, 0.0), axis=1)
        first = tl.sum(tl.where(parts < part, chosen, 0.0), axis=0).to(tl.int32)
        limit = (level + 1).to(tl.float32)
        if level == LEVELS - 1:
            limit = float("inf")
        columns = part * BLOCK + tl.arange(0, BLOCK)
        depths = -scaled(row, columns, V, highest, temperature)
        is_candidate = (columns < V) & (depths <= limit)
        places = first + tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
        bits = tl.abs(depths).to(tl.int32, bitcast=True)
        tl.store(candidates_ptr + place * V + places, bits, mask=is_candidate)
        if part == 0:
            tl.store(sizes_ptr + place, tl.sum(chosen, axis=0).to(tl.int32))
            tl.store(totals_ptr + place, total)


@triton.jit
def _weights(candidates, start, size, V, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of candidates, and their weights, 0 where the bits are not below `limit`.

    What lies behind the last is read too, a whole vector at a time, and made 0.
    """
    places = start + tl.arange(0, BLOCK)
    found = tl.load(candidates + places, mask=places < V, other=0)
    found = tl.where(places < size, found, 0)
    bits = found.to(tl.uint32, bitcast=True)
    weights = tl.full([BLOCK], 1.0, tl.float32)
    if MASS:
        weights = tl.exp(-tl.abs(found.to(tl.float32, bitcast=True)))
    return bits, tl.where((places < size) & (bits < limit), weights, 0.0)


@triton.jit
def _search(candidates, size, V, limit, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The least bits up to which `wanted` candidates lie, or MASS: as much of exp(x).

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
        for start in range(0, size, BLOCK):
            bits, weights = _weights(candidates, start, size, V, limit, MASS, BLOCK)
            sums_1 += tl.where(bits <= first, weights, 0.0)
            sums_2 += tl.where(bits <= second, weights, 0.0)
            sums_3 += tl.where(bits <= third, weights, 0.0)
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
def _search_kernel(
    highest_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    candidates_ptr,
    sizes_ptr,
    totals_ptr,
    last_ptr,
    V,
    P,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    given = tl.load(rows_ptr + place)
    temperature = tl.load(temperature_ptr + given)
    top_k, top_p = tl.load(top_k_ptr + given), tl.load(top_p_ptr + given)
    highest = highest_of(highest_ptr, place, P, BLOCK_P)
    if _is_filtered(temperature, top_k, top_p, V, highest):
        candidates = candidates_ptr + place * V
        size = tl.load(sizes_ptr + place)
        last = tl.full([1], 0xFFFFFFFF, tl.uint32)  # the bits of the last token that is kept
        total = tl.load(totals_ptr + place)
        if (top_k > 0) & (top_k < V):
            k = top_k.to(tl.float32)
            last, before = _search(candidates, size, V, last, k, False, BLOCK)
            sums = tl.zeros([BLOCK], tl.float32)
            for start in range(0, size, BLOCK):
                _, weights = _weights(candidates, start, size, V, last, True, BLOCK)
                sums += weights
            tied = tl.sum(tl.exp(-last.to(tl.float32, bitcast=True)), axis=0)
            total = tl.sum(sums, axis=0) + (k - before) * tied
        if top_p < 1.0:
            found, before = _search(candidates, size, V, last, top_p * total, True, BLOCK)
            last = tl.minimum(last, found)
        tl.store(last_ptr + place + tl.zeros([1], tl.int64), last.to(tl.int32, bitcast=True))


def find_thresholds(
    logits: torch.Tensor,
    highest: torch.Tensor,
    rows: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    last: torch.Tensor,
    part: int,
) -> None:
    """Fill `last` as above; parts have `part` tokens. For `sampling.sample`, which checks them."""
    (num_rows, vocabulary), num_parts = logits.shape, highest.shape[1]
    device = logits.device
    counts, masses = (torch.empty(num_rows, num_parts, _LEVELS, device=device) for _ in range(2))
    candidates = torch.empty(num_rows, vocabulary, dtype=torch.int32, device=device)
    sizes = torch.empty(num_rows, dtype=torch.int32, device=device)
    totals = torch.empty(num_rows, device=device)
    given = (highest, rows, temperature, top_k, top_p)
    shape = (logits.stride(0), vocabulary, num_parts)
    parts = {"BLOCK_P": triton.next_power_of_2(num_parts)}
    # Said outright, since Triton 3.10 changes the default.
    options = {"num_warps": 8, "enable_fp_fusion": True}
    grid = (num_rows, num_parts)
    _levels_kernel[grid](
        logits,
        *given,
        counts,
        masses,
        *shape,
        BLOCK=part,
        LEVELS=_LEVELS,
        **parts,
        **options,
    )
    _gather_kernel[grid](
        logits,
        *given,
        counts,
        masses,
        candidates,
        sizes,
        totals,
        *shape,
        _MARGIN,
        BLOCK=part,
        LEVELS=_LEVELS,
        **parts,
        **options,
    )
    _search_kernel[(num_rows,)](
        *given,
        candidates,
        sizes,
        totals,
        last,
        vocabulary,
        num_parts,
        BLOCK=min(_BLOCK, part),
        **parts,
        **options,
    )
