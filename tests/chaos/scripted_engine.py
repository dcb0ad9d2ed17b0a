"""An engine that generates the tokens of `mix`, one for every sequence and step."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mix import letters, token
from tokenmill.engine.engine import Capacity, StepOutput
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.params import SamplingParams


class LetterTokenizer:
    """A byte of the prompt is a token, a token of the output is a letter."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return letters(token_ids)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tools: Sequence[object] = ()
    ) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))


@dataclass
class Running:
    """One sequence."""

    prompt: bytes
    seed: int
    epoch: int
    most: int
    output: list[int]


@dataclass
class ScriptedEngine:
    """A step takes `step_s`, the first one after an idle time `first_step_s`; some fail."""

    step_s: float
    first_step_s: float
    max_num_seqs: int
    #: Share of the steps that fail.
    failing: float = 0.0
    max_model_len: int = 100_000
    model_name: str = "scripted"
    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    running: dict[str, Running] = field(default_factory=dict)
    is_first: bool = True

    @property
    def has_work(self) -> bool:
        return bool(self.running)

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
        epoch = int(seq_id.rpartition("#")[2])
        self.is_first = self.is_first or not self.running
        self.running[seq_id] = Running(
            bytes(prompt_ids), seed, epoch, params.max_tokens, list(output_ids)
        )

    def abort(self, seq_id: str) -> None:
        self.running.pop(seq_id, None)

    def step(self) -> list[StepOutput]:
        time.sleep(self.first_step_s if self.is_first else self.step_s)
        self.is_first = False
        if random.random() < self.failing:
            raise RuntimeError("a step that was to fail")
        return [self._advance(seq_id) for seq_id in list(self.running)[: self.max_num_seqs]]

    def _advance(self, seq_id: str) -> StepOutput:
        item = self.running[seq_id]
        given: tuple[int, ...] = ()
        if len(item.output) < item.most:
            given = (token(item.prompt, item.seed, item.output, item.epoch),)
            item.output.extend(given)
        if len(item.output) < item.most:
            return StepOutput(seq_id, given)
        del self.running[seq_id]
        return StepOutput(seq_id, given, FinishReason.LENGTH)

    def capacity(self) -> Capacity:
        free = self.max_num_seqs + 2 - len(self.running)
        return Capacity(tokens=4096, blocks=10_000, sequences=max(free, 0), block_size=32)
