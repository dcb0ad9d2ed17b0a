"""`keep_likely` for a CPU, compiled: top_k, top_p and min_p of a row without sorting it.

    keep p if      count(those above p) < top_k
    and            sum(those above p)   < top_p * (sum of the top_k likeliest)
    and            p >= min_p * max

Each condition holds from some probability on, whose bits are found by halving: some 30 times the
row's probabilities are added up, in the second-level cache. An item of work is a row.
"""

import numpy as np
import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled, inner
from tokenmill.kernels.filter_vectors import STRIDE, count_above, drop_below, mass_above, weigh_row
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import WIDTH, fetch_add, floats, int64s

#: The bits of 1, which the likeliest has.
_ONE = 0x3F800000


@inner
def _least(weights, size, low, target, is_counted):
    """The lowest bits from `low` on above which weights are fewer than that, or add up to less."""
    high = _ONE
    while low < high:
        middle = (low + high) // 2
        if is_counted:
            above = count_above(weights, size, middle)
        else:
            above = mass_above(weights, size, middle)
        if above < target:
            high = middle
        else:
            low = middle + 1
    return high


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (9,))
    num_rows, vocabulary, logits, stride = given[3], given[4], given[5], given[6]
    params = carray(int64s(given[7]), (num_rows, 3)).view(np.float64)
    size = (vocabulary + STRIDE - 1) // STRIDE * STRIDE
    weights = given[8] + 4 * size * fetch_add(data, 1)
    padding = carray(floats(weights), (size,))
    for place in range(vocabulary, size):
        padding[place] = 0
    row = fetch_add(data + 8, 1)
    while row < num_rows:
        top_k, top_p, min_p = params[row, 0], params[row, 1], params[row, 2]
        at = logits + 4 * row * stride
        weigh_row(at, weights, vocabulary)
        least = np.int64(np.float32(min_p).view(np.int32))
        total = mass_above(weights, size, 0)
        by_count = 0
        if top_k < vocabulary:
            by_count = _least(weights, size, 0, np.float32(top_k), True)
            value = np.int32(by_count).view(np.float32)
            above = count_above(weights, size, by_count)
            total = mass_above(weights, size, by_count) + np.float32(top_k - above) * value
            least = max(least, by_count)
        if top_p < 1:
            target = np.float32(top_p) * total
            least = max(least, _least(weights, size, by_count, target, False))
        drop_below(at, weights, vocabulary, least)
        row = fetch_add(data + 8, 1)


def can_filter(logits: torch.Tensor) -> bool:
    """Whether `keep_likely` takes logits [R, V]."""
    is_plain = logits.device.type == "cpu" and logits.dtype == torch.float32
    return is_plain and logits.stride(1) == 1 and logits.shape[1] >= WIDTH


def keep_likely(logits: torch.Tensor, params: list[tuple[float, float, float]]) -> None:
    """Set what is left out of `logits` [R, V] to -inf; of each row top_k, top_p and min_p.

    A top_k of V or more and a top_p of 1 or more leave nothing out.
    """
    num_rows, vocabulary = logits.shape
    size = -(-vocabulary // STRIDE) * STRIDE
    told = torch.tensor(params, dtype=torch.float64)
    weights = torch.empty(size * min(torch.get_num_threads(), num_rows), dtype=torch.float32)
    if num_rows:
        addresses = [logits.data_ptr(), logits.stride(0), told.data_ptr(), weights.data_ptr()]
        run(Call(_work, [num_rows, vocabulary, *addresses]), num_rows)
