"""`Executor`: runs planned steps. A step is launched, and what it gave is collected later.

    launch   the chunks go to the device                  nothing is waited for
    collect  their tokens come to the host                waits for the device

`HostExecutor` lays every step out on the host, and has its tokens before it returns the ticket.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from tokenmill.engine.batch import build_batch
from tokenmill.engine.cost_model import kv_tokens_read
from tokenmill.engine.logprobs import prompt_logprobs
from tokenmill.engine.models.low_rank import Adapter
from tokenmill.engine.runner import Runner
from tokenmill.engine.sampler import sample
from tokenmill.engine.scheduler import Chunk, SchedulerOutput
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.producer.logprobs import TokenLogprobs

#: A sequence's next token, and its log probability where that was asked for.
Sampled = tuple[Sequence, int, TokenLogprobs | None]
#: A sequence, and what a step tells of its prompt's next tokens.
Told = tuple[Sequence, tuple[TokenLogprobs, ...]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave: of prompts that are told of, and one token for each sequence sampled."""

    told: Seq[Told]
    sampled: Seq[Sampled]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A step that has been launched; `started` is when the work on it began, on the host."""

    chunks: Seq[Chunk]
    sampled: Seq[Sequence]
    num_tokens: int
    started: float
    collect: Callable[[], StepResult]

    @property
    def kv_tokens(self) -> int:
        """Keys that its queries read."""
        return sum(kv_tokens_read(chunk.start, chunk.length) for chunk in self.chunks)


class Executor(Protocol):
    """Where steps run."""

    def launch(self, plan: SchedulerOutput, started: float) -> Ticket:
        """Run a step; its sequences may be changed as soon as this returns."""
        ...

    def reset(self) -> None:
        """A step failed: forget what was launched."""
        ...


def sampled_of(chunks: Seq[Chunk]) -> list[Sequence]:
    """The sequences of a step that a token is drawn for: their newest token is in it."""
    return [c.seq for c in chunks if c.start + c.length == c.seq.num_tokens]


class HostExecutor:
    """Lays steps out on the host, one after the other, on any device and in any group."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, adapters: Mapping[str, Adapter]
    ) -> None:
        self._runner = runner
        self._adapters = adapters
        self._eos_token_ids = tokenizer.eos_token_ids

    def launch(self, plan: SchedulerOutput, started: float) -> Ticket:
        """Run a step, to its tokens."""
        block_size = self._runner.size.block_size
        self._runner.forward(build_batch(plan.chunks, block_size, self._adapters))
        ready = sampled_of(plan.chunks)
        result = StepResult(list(self._tell(plan.chunks, len(ready))), list(self._sample(ready)))
        return Ticket(plan.chunks, ready, plan.num_tokens, started, lambda: result)

    def reset(self) -> None:
        """Nothing is ever left behind."""

    def _tell(self, chunks: Seq[Chunk], num_ready: int) -> Iterator[Told]:
        return prompt_logprobs(
            chunks, self._runner.logits, first=num_ready, vocabulary=self._runner.vocab_size
        )

    def _sample(self, ready: Seq[Sequence]) -> Iterator[Sampled]:
        if not ready:
            return iter(())
        logits = self._runner.logits(0, len(ready))
        return zip(ready, *sample(logits, ready, self._eos_token_ids), strict=True)
