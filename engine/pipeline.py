"""`Pipeline`: generate in this process, without a queue.

from tokenmill.engine.pipeline import Pipeline

answers = Pipeline("smollm2")(["Once upon a time"], max_tokens=32)
"""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.detokenizer import Detokenizer
from tokenmill.engine.engine import Engine, StepOutput
from tokenmill.engine.loader import load
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.params import SamplingParams, derived_seed

#: A text as it is, token ids, or the messages of a chat.
Prompt = str | Seq[int] | Seq[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the answer to prompt `index`, as it comes."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str = ""


class Pipeline:
    """A model in this process, computed as through the queue; one call or stream at a time.

    Raises:
        ModelNotFound, UnsupportedModel, OutOfMemory, InvalidRequest: as `load` and `Engine` do.
    """

    def __init__(
        self, model: str, *, device: str = "auto", dtype: str = "auto", **config: Any
    ) -> None:
        self.engine = Engine(load(model, device=device, dtype=dtype), EngineConfig(**config))

    def __call__(self, prompts: Prompt | Seq[Prompt], **sampling: Any) -> list[Generation]:
        """Answer every prompt, in order; a single prompt is a list of one.

        Raises:
            InvalidRequest: a prompt or a sampling parameter is out of bounds.
        """
        several: Seq[Any] = [prompts] if _is_one(prompts) else prompts
        texts: list[list[str]] = [[] for _ in several]
        tokens: list[list[int]] = [[] for _ in several]
        reasons = ["" for _ in several]
        for piece in self.stream(several, **sampling):
            texts[piece.index].append(piece.text)
            tokens[piece.index] += piece.token_ids
            reasons[piece.index] = piece.finish_reason or reasons[piece.index]
        return [
            Generation("".join(text), tuple(ids), reason, len(self.encode(prompt)))
            for prompt, text, ids, reason in zip(several, texts, tokens, reasons, strict=True)
        ]

    def stream(self, prompts: Seq[Prompt], **sampling: Any) -> Iterator[Piece]:
        """Pieces of all answers as they come; the last one of each has a finish reason.

        Raises:
            InvalidRequest: a prompt or a sampling parameter is out of bounds.
        """
        params = SamplingParams(**sampling)
        detokenizers = {}
        try:
            for index, prompt in enumerate(prompts):
                key = str(index)
                seed = derived_seed(key) if params.seed is None else params.seed
                self.engine.add(key, self.encode(prompt), params, seed=seed)
                detokenizers[key] = Detokenizer(self.engine.tokenizer, params.stop)
            while self.engine.has_work:
                for output in self.engine.step():
                    yield self._piece(output, detokenizers[output.seq_id])
        finally:  # a caller that leaves early, or a prompt that was refused
            for key in detokenizers:
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

    def _piece(self, output: StepOutput, detokenizer: Detokenizer) -> Piece:
        text = detokenizer.feed(output.token_ids)
        reason = output.finish_reason
        if detokenizer.stopped:
            self.engine.abort(output.seq_id)
            reason = FinishReason.STOP
        elif reason is not None:
            text += detokenizer.finish()
        word = "" if reason is None else reason.value
        return Piece(int(output.seq_id), output.token_ids, text, word)


def _is_one(prompts: Prompt | Seq[Prompt]) -> bool:
    """A text, the token ids or the messages of one prompt, rather than several prompts."""
    return isinstance(prompts, str) or bool(prompts and isinstance(prompts[0], int | Mapping))
