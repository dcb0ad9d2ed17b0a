"""The items of work of one call of compiled attention, in the order in which threads take them.

An item is one part of a chunk, or all rows of a sequence that decodes; each KV head does it.

    c d c d d c d c d c d d d    c: parts of chunks, longest first; d: decoding rows

Reading keys and values takes its time beside computing, so both are done at once; the last items
are short ones, so that threads end together.
"""

import math

import numpy as np
import torch

#: Rows of an item at the most; with their scores they take half of a usual L2 cache.
MOST_ROWS = 192
#: Items that each thread should have, and the rows below which they do not pay.
_ITEMS_OF_A_THREAD, _FEWEST_ROWS = 4, 24
#: Share of the decoding rows that is done beside the chunks, if both take as long.
_BESIDE = 0.7


def items(
    cu_seqlens_q: torch.Tensor,  # [S + 1] int32
    context_lens: torch.Tensor,  # [S] int32
    *,
    group: int,
    num_kv_heads: int,
    most_few: int,
    num_threads: int,
) -> np.ndarray:
    """Return int64 [N, 4]: sequence, first row, tokens computed before, tokens of the item.

    `group`: rows of a token; `most_few`: rows up to which a sequence counts as decoding.
    """
    starts, contexts = cu_seqlens_q.numpy().astype(np.int64), context_lens.numpy()
    lengths = np.diff(starts)
    share = int(lengths.sum()) * group * num_kv_heads // (_ITEMS_OF_A_THREAD * num_threads)
    most_tokens = max(1, min(MOST_ROWS, max(_FEWEST_ROWS, share)) // group)
    is_few = lengths * group <= most_few
    parts = np.where(is_few, lengths > 0, -(-lengths // most_tokens))
    even = num_threads // math.gcd(num_threads, num_kv_heads)  # then all threads have as many
    parts = np.where(parts > 1, -(-parts // even) * even, parts)
    sizes = np.maximum(-(-lengths // np.maximum(parts, 1)), 1)
    parts = -(-lengths // sizes)
    number = np.repeat(np.arange(len(lengths)), parts)
    skipped = (np.arange(len(number)) - np.repeat(np.cumsum(parts) - parts, parts)) * sizes[number]
    before = (contexts - lengths)[number] + skipped
    tokens = np.minimum(sizes[number], lengths[number] - skipped)
    found = np.stack([number, starts[number] + skipped, before, tokens])
    return found.T.take(_order(is_few[number], tokens * (2 * before + tokens)), axis=0)


def _order(is_few: np.ndarray, work: np.ndarray) -> np.ndarray:
    order = np.lexsort((-work, is_few))
    num_few = int(np.count_nonzero(is_few))
    num_many = len(order) - num_few
    when = [
        np.arange(num_many) / max(num_many, 1),
        np.arange(num_few) / (_BESIDE * max(num_few, 1)),
    ]
    return order.take(np.argsort(np.concatenate(when), kind="stable"))
