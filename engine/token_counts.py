"""`TokenCounts`: how often each token stands in an output. Standard library only."""

from array import array
from collections.abc import Sequence


class TokenCounts:
    """The distinct tokens of prompt and output, with the times that the output has each.

    A function of the token ids alone, counted as they come: a resumed sequence counts what was
    committed, and goes on with the same penalties.
    """

    __slots__ = ("_index", "_num_prompt_tokens", "_num_seen", "counts", "token_ids")

    def __init__(self, num_prompt_tokens: int) -> None:
        self.token_ids = array("q")
        self.counts = array("f")
        self._index: dict[int, int] = {}
        self._num_seen = 0
        self._num_prompt_tokens = num_prompt_tokens

    def update(self, token_ids: Sequence[int]) -> None:
        """Count what is new in a sequence's `token_ids`."""
        for position in range(self._num_seen, len(token_ids)):
            at = self._index.setdefault(token_ids[position], len(self.token_ids))
            if at == len(self.token_ids):
                self.token_ids.append(token_ids[position])
                self.counts.append(0)
            if position >= self._num_prompt_tokens:
                self.counts[at] += 1
        self._num_seen = len(token_ids)
