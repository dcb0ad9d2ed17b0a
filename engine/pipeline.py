"""`Pipeline`: generate in this process, without a queue.

from tokenmill.engine.pipeline import Pipeline

answers = Pipeline("smollm2")(["Once upon a time"], max_tokens=32)
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Self

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.engine import StepOutput
from tokenmill.engine.sequence import FinishReason
from tokenmill.engine.start import start_engine
from tokenmill.producer.logprobs import TokenLogprobs
from tokenmill.producer.params import SamplingParams, check_choices, choice_seed, derived_seed

#: A text as it is, token ids, or the messages of a chat.
Prompt = str | Seq[int] | Seq[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Generation:
    """One whole answer to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    #: One for each of `token_ids`, where asked for.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: Of the prompt's tokens from the second on, where asked for.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer to prompt `index`, as it comes."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str = ""
    #: Which of the prompt's `n` answers.
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Pipeline:
    """A model in this process, computed as through the queue; one call or stream at a time.

    With `tensor_parallel_size=N` it is divided among N devices; the processes of the others end
    with this one, or with `close` (or the end of a `with`).

    Raises:
        ModelNotFound, UnsupportedModel, OutOfMemory, InvalidRequest, GroupLost: as `start_engine`
            does.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str = "none",
        **config: Any,
    ) -> None:
        self.engine = start_engine(
            model, EngineConfig(**config), device=device, dtype=dtype, quantization=quantization
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other processes, if there are any."""
        self.engine.close()

    def __call__(
        self, prompts: Prompt | Seq[Prompt], *, n: int = 1, **sampling: Any
    ) -> list[Generation]:
        """Answer every prompt, in order; a single prompt is a list of one.

        With `n`, the n answers to the first prompt come first, then those to the second, ...

        Raises:
            InvalidRequest: a prompt or a sampling parameter is out of bounds.
        """
        several: Seq[Any] = [prompts] if _is_one(prompts) else prompts
        pieces: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece in self.stream(several, n=n, **sampling):
            pieces[piece.index, piece.choice].append(piece)
        sizes = [len(self.encode(prompt)) for prompt in several]
        return [_joined(pieces[key], sizes[key[0]]) for key in sorted(pieces)]

    def stream(self, prompts: Seq[Prompt], *, n: int = 1, **sampling: Any) -> Iterator[Piece]:
        """Pieces of all answers as they come; the last one of each has a finish reason.

        Raises:
            InvalidRequest: a prompt or a sampling parameter is out of bounds.
        """
        check_choices(n)
        params = SamplingParams(**sampling)
        running: dict[str, _Running] = {}
        self.engine.compile(params)
        try:
            for index, prompt in enumerate(prompts):
                seed = derived_seed(str(index)) if params.seed is None else params.seed
                prompt_ids = self.encode(prompt)
                for choice in range(n):
                    key = f"{index}.{choice}"
                    self.engine.add(key, prompt_ids, params, seed=choice_seed(seed, choice))
                    text = Detokenizer(self.engine.tokenizer, params.stop)
                    running[key] = _Running(index, choice, text)
            while self.engine.has_work:
                for output in self.engine.step():
                    yield self._piece(output, running[output.seq_id])
        finally:  # a caller that leaves early, or a prompt that was refused
            for key in running:
                self.engine.abort(key)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InvalidRequest: messages for a model without a chat template.
        """
        if isinstance(prompt, str):
            return self.engine.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.engine.tokenizer.apply_chat_template(prompt)  # type: ignore[arg-type]
        return list(prompt)  # type: ignore[arg-type]

    def _piece(self, output: StepOutput, running: "_Running") -> Piece:
        text = running.detokenizer.feed(output.token_ids)
        reason = output.finish_reason
        if running.detokenizer.stopped:
            self.engine.abort(output.seq_id)
            reason = FinishReason.STOP
        elif reason is not None:
            text += running.detokenizer.finish()
        return Piece(
            running.index,
            output.token_ids,
            text,
            "" if reason is None else reason.value,
            running.choice,
            output.logprobs,
            output.prompt_logprobs,
        )


@dataclass(frozen=True, slots=True)
class _Running:
    """An answer in the engine."""

    index: int
    choice: int
    detokenizer: Detokenizer


def _joined(pieces: Seq[Piece], num_prompt_tokens: int) -> Generation:
    return Generation(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        pieces[-1].finish_reason,
        num_prompt_tokens,
        tuple(row for piece in pieces for row in piece.logprobs),
        tuple(row for piece in pieces for row in piece.prompt_logprobs),
    )


def _is_one(prompts: Prompt | Seq[Prompt]) -> bool:
    """A text, the token ids or the messages of one prompt, rather than several prompts."""
    return isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], int | Mapping))
