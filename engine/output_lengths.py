"""`OutputLengths`: how long outputs are expected to become. Standard library only."""

import bisect
from collections import deque

#: Expected output before anything has finished, in tokens.
INITIAL = 256
#: Finished outputs that are looked back on, and the share of them that an expectation covers.
HISTORY, QUANTILE = 256, 0.8


class OutputLengths:
    """A running quantile of the lengths of finished outputs."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._ranked: list[int] = []

    def record(self, length: int) -> None:
        """An output has ended after `length` tokens."""
        if len(self._recent) == HISTORY:
            self._ranked.pop(bisect.bisect_left(self._ranked, self._recent.popleft()))
        self._recent.append(length)
        bisect.insort(self._ranked, length)

    def expect(self, so_far: int = 0) -> int:
        """The length that an output of `so_far` tokens will hardly exceed.

        Judged by those that were longer still; when there were none, it may double.
        """
        ranked = self._ranked or [INITIAL]
        longer = bisect.bisect_right(ranked, so_far)
        if longer == len(ranked):
            return 2 * so_far + 1
        return ranked[longer + int(QUANTILE * (len(ranked) - longer - 1))]
