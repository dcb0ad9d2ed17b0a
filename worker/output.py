"""`Output`: the tokens and text of one running request that are still to be written.

    tokens   [ committed ........ | unsent ... ]
             0                 start           end
    text     what the detokenizer has given for the unsent tokens; it may hold some back

The text of the first n tokens is a function of those tokens alone, so a resumed request, whose
committed tokens are fed again, goes on at the exact character.
"""

from collections.abc import Sequence

from tokenmill.engine.detokenizer import Decodes, Detokenizer
from tokenmill.producer.logprobs import TokenLogprobs, pack_logprobs
from tokenmill.producer.wire import Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish

#: With a reply stream nobody waits for a token: they are committed in pieces of so many.
CHECKPOINT_TOKENS = 256


def seq_id_of(claim: Claim) -> str:
    """The engine's id of a claim: a request claimed again by this worker is another sequence."""
    return f"{claim.request_id}#{claim.epoch}"


class Output:
    """One claim from its first token here to its end. Owned by the publisher's thread."""

    def __init__(self, claim: Claim, tokenizer: Decodes, *, prompt_tokens: int) -> None:
        self.seq_id = seq_id_of(claim)
        self.request_id = claim.request_id
        self.epoch = claim.epoch
        #: Tokens the server has.
        self.start = len(claim.token_ids)
        #: Set once: the word on the wire, and why.
        self.finish_reason = ""
        self.reason = ""
        self._is_streamed = not claim.request.reply_to
        self._prompt_tokens = prompt_tokens
        self._resumed_at = self.start
        self._digest = chain_digest("", claim.token_ids)
        self._token_ids: list[int] = []
        self._text = ""
        #: Packed: of the unsent tokens, and of the prompt before the first of them.
        self._logprobs = b""
        self._detokenizer = Detokenizer(tokenizer, claim.request.params.stop)
        self._detokenizer.feed(claim.token_ids)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._detokenizer.stopped

    @property
    def has_unsent(self) -> bool:
        return bool(self._token_ids)

    @property
    def is_due(self) -> bool:
        """Whether what is unsent is to be written with the next flush."""
        return len(self._token_ids) >= (1 if self._is_streamed else CHECKPOINT_TOKENS)

    @property
    def is_urgent(self) -> bool:
        """Whether it has its first tokens, for which somebody waits."""
        return self._is_streamed and bool(self._token_ids) and self.start == self._resumed_at

    def feed(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Take new tokens; those after a complete stop string are not kept."""
        before = self._detokenizer.num_tokens
        self._text += self._detokenizer.feed(token_ids)
        kept = self._detokenizer.num_tokens - before
        self._token_ids += token_ids[:kept]
        if logprobs:
            self._logprobs += pack_logprobs(logprobs[:kept])

    def feed_prompt(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Take what was told of the prompt; it goes with the first token."""
        self._logprobs += pack_logprobs(logprobs, of_prompt=True)

    def end(self, finish_reason: str, reason: str = "") -> None:
        """No more tokens come; the text held back is let go."""
        self.finish_reason, self.reason = finish_reason, reason
        self._text += self._detokenizer.finish()

    def to_question(self) -> Append:
        """No tokens: it only asks for the verdict."""
        return Append(
            request_id=self.request_id,
            epoch=self.epoch,
            start=self.start,
            token_ids=(),
            text="",
            digest=self._digest,
        )

    def to_append(self) -> Append:
        """What is unsent."""
        return Append(
            request_id=self.request_id,
            epoch=self.epoch,
            start=self.start,
            token_ids=tuple(self._token_ids),
            text=self._text,
            digest=chain_digest(self._digest, self._token_ids),
            logprobs=self._logprobs,
        )

    def written(self, append: Append) -> None:
        """The server has it."""
        if append.token_ids:
            self.start += len(append.token_ids)
            self._digest = append.digest
            self._token_ids, self._text, self._logprobs = [], "", b""

    def to_finish(self) -> Finish:
        """The end, with what is unsent."""
        return Finish(
            request_id=self.request_id,
            epoch=self.epoch,
            start=self.start,
            token_ids=tuple(self._token_ids),
            text=self._text,
            digest=chain_digest(self._digest, self._token_ids),
            logprobs=self._logprobs,
            finish_reason=self.finish_reason,
            reason=self.reason,
            usage=Usage(
                prompt_tokens=self._prompt_tokens,
                completion_tokens=self.start + len(self._token_ids),
            ),
        )
