"""`ScriptedEngine`: an engine without a model, whose every token is known beforehand.

A token depends on the prompt, the position and the epoch, so that a token of a worker that had
lost its claim is seen wherever it appears. The text is one letter a token.
"""

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenmill.engine.capacity import Capacity
from tokenmill.engine.engine import StepOutput
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams


def scripted_token(prompt_ids: Sequence[int], position: int, epoch: int) -> int:
    """The token at an offset of the output; the epoch is its last four bits."""
    text = f"{list(prompt_ids)} {position}"
    return zlib.crc32(text.encode()) % 2**24 << 4 | epoch % 16


class ScriptedTokenizer:
    """A byte of the prompt is a token, a token of the output is a letter."""

    def encode(self, text: str) -> list[int]:
        if text == "cannot be tokenized":
            raise ValueError(text)
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(97 + (token_id >> 4) % 26) for token_id in token_ids)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tools: Sequence[object] = ()
    ) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


@dataclass
class Scripted:
    """One sequence."""

    prompt_ids: tuple[int, ...]
    seed: int
    epoch: int
    #: Tokens at most.
    most: int
    output: list[int]


@dataclass
class ScriptedEngine:
    """Every sequence gets one token a step."""

    max_num_seqs: int = 16
    step_s: float = 0.0
    max_model_len: int = 100_000
    model_name: str = "scripted"
    quantization: str = "none"
    kv_cache_dtype: str = "float32"
    tokenizer: ScriptedTokenizer = field(default_factory=ScriptedTokenizer)
    sequences: dict[str, Scripted] = field(default_factory=dict)
    #: Raised by the next steps.
    errors: list[Exception] = field(default_factory=list)
    #: A step fails when a sequence of this prompt has so many tokens.
    poison: tuple[tuple[int, ...], int] | None = None
    aborted: list[str] = field(default_factory=list)
    is_closed: bool = False

    @property
    def has_work(self) -> bool:
        return bool(self.sequences)

    def add(
        self,
        seq_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        output_ids: Sequence[int],
        seed: int,
        priority: int,
    ) -> None:
        if len(prompt_ids) >= self.max_model_len:
            raise InvalidRequest("prompt", f"below {self.max_model_len} tokens", len(prompt_ids))
        if seq_id in self.sequences:
            raise InvalidRequest("seq_id", "new", seq_id)
        epoch = int(seq_id.rpartition("#")[2])
        self.sequences[seq_id] = Scripted(
            tuple(prompt_ids), seed, epoch, params.max_tokens, list(output_ids)
        )

    def abort(self, seq_id: str) -> None:
        if self.sequences.pop(seq_id, None):
            self.aborted.append(seq_id)

    def step(self) -> list[StepOutput]:
        if self.errors:
            raise self.errors.pop(0)
        for item in self.sequences.values():
            if self.poison == (item.prompt_ids, len(item.output)):
                raise RuntimeError("poison")
        time.sleep(self.step_s)  # the forward pass
        return [self._advance(seq_id) for seq_id in list(self.sequences)[: self.max_num_seqs]]

    def token(self, item: Scripted) -> int:
        """The next token of a sequence."""
        return scripted_token(item.prompt_ids, len(item.output), item.epoch)

    def capacity(self) -> Capacity:
        free = self.max_num_seqs + 2 - len(self.sequences)
        return Capacity(tokens=4096, blocks=10_000, sequences=max(free, 0), block_size=32)

    def close(self) -> None:
        self.is_closed = True

    def _advance(self, seq_id: str) -> StepOutput:
        item = self.sequences[seq_id]
        given: tuple[int, ...] = ()
        if len(item.output) < item.most:
            given = (self.token(item),)
            item.output.extend(given)
        if len(item.output) < item.most:
            return StepOutput(seq_id, given)
        del self.sequences[seq_id]
        return StepOutput(seq_id, given, FinishReason.LENGTH)
