"""`Detokenizer`: the tokens of one sequence to text, piece by piece.

What has been emitted after n tokens is a function of those n tokens alone, however they were fed.
So a worker that resumes a request feeds the committed tokens, throws the text away, and goes on at
the exact character.

    decoded   [ emitted .......... | held ]
    held back: half a UTF-8 character, or what may be the beginning of a stop string
"""

from collections.abc import Iterable
from typing import Protocol

_REPLACEMENT = "\ufffd"


class Decodes(Protocol):
    """Of a tokenizer, what is needed here."""

    def decode(self, token_ids: list[int]) -> str: ...


class Detokenizer:
    """Feeds tokens in, gives out text that no later token can change."""

    def __init__(self, tokenizer: Decodes, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""
        # The first `_read` tokens are the context in which newer ones are decoded: a token's text
        # may depend on the one before it (leading spaces), never on more.
        self._ids: list[int] = []
        self._read = 0
        #: Whether a stop string is complete; further tokens are ignored.
        self.stopped = False
        #: Tokens kept, up to and including the one that completed a stop string.
        self.num_tokens = 0

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; returns the text that is now certain."""
        return "".join(map(self._feed_one, token_ids))

    def finish(self) -> str:
        """The text still held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._held + self._new_text()
        self._held, self._ids, self._read = "", [], 0
        cut = self._first_stop(text)
        return text if cut is None else text[:cut]

    def _feed_one(self, token_id: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token_id)
        self.num_tokens += 1
        new = self._new_text()
        if not new or new.endswith(_REPLACEMENT):
            return ""
        # Keep the last word only: memory stays small whatever the length of the output.
        del self._ids[: self._read]
        self._read = len(self._ids)
        if not self._stop:
            return new
        text = self._held + new
        cut = self._first_stop(text)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _new_text(self) -> str:
        decode, ids, read = self._tokenizer.decode, self._ids, self._read
        return decode(ids)[len(decode(ids[:read])) :] if read else decode(ids)

    def _first_stop(self, text: str) -> int | None:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
