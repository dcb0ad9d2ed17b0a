"""`FailingEngine`: the scripted engine with the tokens of `mix`, slow first steps, and failures."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mix import letters, token
from scripted_engine import Scripted, ScriptedEngine, ScriptedTokenizer
from tokenmill.engine.engine import StepOutput
from tokenmill.producer.params import SamplingParams


class LetterTokenizer(ScriptedTokenizer):
    """Its letters are those of `mix`."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return letters(token_ids)


@dataclass
class FailingEngine(ScriptedEngine):
    """A step takes `step_s`, the first one after an idle time `first_step_s` more; some fail."""

    first_step_s: float = 0.0
    #: Share of the steps that fail.
    failing: float = 0.0
    tokenizer: ScriptedTokenizer = field(default_factory=LetterTokenizer)
    is_first: bool = True

    def add(
        self, seq_id: str, prompt_ids: Sequence[int], params: SamplingParams, **rest: Any
    ) -> None:
        self.is_first = self.is_first or not self.sequences
        super().add(seq_id, prompt_ids, params, **rest)

    def step(self) -> list[StepOutput]:
        if self.is_first:
            time.sleep(self.first_step_s)
            self.is_first = False
        if random.random() < self.failing:
            raise RuntimeError("a step that was to fail")
        return super().step()

    def token(self, item: Scripted) -> int:
        return token(bytes(item.prompt_ids), item.seed, item.output, item.epoch)
