"""`Probation`: after a step failed under several sequences, each of them is tried alone.

Nobody can tell which sequence a failed step failed for. If every sequence of it paid with an
attempt, one request that no engine survives would end all that run beside it. So they come back
unpaid, and until each has been alone in the engine, nothing runs in company: the guilty one fails
alone, and pays. What is alone is cleared by its end or by `LONE_TOKENS` tokens, and makes room for
the next one: where the guilty one failed is the next thing it does, since whatever it gave before
is committed.
"""

from collections.abc import Iterable

#: The first proves the prompt and the committed tokens, the second a step of decoding.
LONE_TOKENS = 2
#: Trials for each suspect: another worker may have taken a suspect, and it will not come.
PATIENCE = 2


class Probation:
    """Suspects are request ids: a suspect comes back under another sequence id."""

    def __init__(self) -> None:
        self._suspects: set[str] = set()
        self._trials_left = 0
        self._given = 0

    @property
    def is_on(self) -> bool:
        """Whether a sequence may only run alone."""
        return bool(self._suspects) and self._trials_left > 0

    def begin(self, seq_ids: Iterable[str]) -> None:
        """A step failed under these together."""
        self._suspects = {_request_of(seq_id) for seq_id in seq_ids}
        self._trials_left = PATIENCE * len(self._suspects)
        self._given = 0

    def is_cleared(self, num_tokens: int) -> bool:
        """Whether the lone sequence has shown enough, having given so many tokens more."""
        self._given += num_tokens
        return self._given >= LONE_TOKENS

    def tried(self, seq_id: str) -> None:
        """The lone sequence was cleared, ended or failed."""
        self._suspects.discard(_request_of(seq_id))
        self._trials_left -= 1
        self._given = 0


def _request_of(seq_id: str) -> str:
    return seq_id.rpartition("#")[0]
