"""`Step`: the token budget and the time limit of one step, while it is filled. No torch."""

import bisect
import math

from tokenmill.engine.cost_model import CostModel
from tokenmill.engine.sequence import Sequence

#: Tokens of a prompt that a step takes if it has nothing else, whatever its time limit.
MIN_CHUNK = 16


class Step:
    """Who computes how many tokens, what is left for others, and who lost its blocks for it."""

    def __init__(self, budget: int, seconds: float, cost: CostModel) -> None:
        self.left = budget
        self.lengths: dict[Sequence, int] = {}
        self.preempted: list[Sequence] = []
        self._seconds_left = seconds
        self._cost = cost
        #: Who computes the full block of this hash.
        self._computing: dict[bytes, Sequence] = {}

    def most(self, seq: Sequence, start: int) -> int:
        """The longest chunk from `start` on that fits; a step with nothing else takes some."""
        most = min(len(seq.token_ids) + seq.num_pending_tokens - start, self.left)
        if most <= 1 or self._cost.seconds_of(start, most) <= self._seconds_left:
            return most
        sizes = range(most)
        fits = bisect.bisect_right(
            sizes, self._seconds_left, key=lambda n: self._cost.seconds_of(start, n)
        )
        return max(fits - 1, 0 if self.lengths else min(most, MIN_CHUNK))

    def take(self, seq: Sequence, length: int, block_size: int) -> None:
        """The sequence computes its next `length` tokens."""
        self.lengths[seq] = length
        self.left -= length
        start = seq.num_computed_tokens
        if self._seconds_left < math.inf:
            self._seconds_left -= self._cost.seconds_of(start, length)
        first, end = start // block_size, (start + length) // block_size
        if first < end:
            for block_hash in seq.block_hashes[first:end]:
                self._computing.setdefault(block_hash, seq)

    def drop(self, seq: Sequence) -> None:
        """The sequence has lost its blocks; what it would have computed is free for others."""
        length = self.lengths.pop(seq, 0)
        self.left += length
        if self._seconds_left < math.inf:
            self._seconds_left += self._cost.seconds_of(seq.num_computed_tokens, length)
        self.preempted.append(seq)

    def is_computing(self, block_hash: bytes | None) -> bool:
        """Whether a sequence of this step computes the block of this hash; None is no block."""
        return block_hash is not None and self._computing.get(block_hash) in self.lengths
