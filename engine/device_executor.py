"""`DeviceExecutor`: steps from rows that stay on the device, launched before the last has ended.

    launch    host     what has changed, as one message         `DeviceRows.lay_out`
              device   the step is laid out and computed, tokens are drawn and appended to the rows
    collect   host     waits for the tokens, which the next step on the device does not

What a launch needs is copied when it is launched: its sequences may change before it runs.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial

import torch

from tokenmill.engine.copies import DeviceStream, Stream, Tensors, Wait, to_device
from tokenmill.engine.device_rows import DeviceRows, Head, Received, RowMessage
from tokenmill.engine.device_sampler import DeviceSampler, Draw
from tokenmill.engine.device_step import StepBuffers, StepShape
from tokenmill.engine.executor import Sampled, StepResult, Ticket
from tokenmill.engine.logprobs import measure, prompt_positions, slices, told_of
from tokenmill.engine.models.low_rank import Adapter
from tokenmill.engine.runner import Runner
from tokenmill.engine.scheduler import Chunk, SchedulerOutput
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step_graphs import StepGraphs
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.producer.logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of a prompt that a step tells of: where their logits are, and what was asked."""

    seq: Sequence
    indices: list[int]
    token_ids: list[int]

    @property
    def num_top(self) -> int:
        return self.seq.params.prompt_logprobs or 0


@dataclass(frozen=True, slots=True)
class Launch:
    """All that a step needs of the host; with `graphs` it is padded to `shape` and captured."""

    message: RowMessage
    shape: StepShape
    num_seqs: int
    graphs: StepGraphs | None
    draw: Draw
    prompts: list[Prompt]
    adapted: list[tuple[Adapter, list[int]]]


class DeviceExecutor:
    """Keeps the rows of running sequences on the runner's device."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        adapters: Mapping[str, Adapter],
        *,
        max_num_seqs: int,
        is_captured: bool = False,
        stream: Stream | None = None,
    ) -> None:
        self._runner = runner
        self._adapters = adapters
        self._stream = stream or DeviceStream()
        size = runner.size
        self._rows = DeviceRows(
            max_num_seqs,
            size.max_model_len,
            size.block_size,
            runner.device,
            tokenizer.eos_token_ids,
        )
        self._sampler = DeviceSampler(self._rows)
        self._graphs = StepGraphs(runner, self._rows, max_num_seqs) if is_captured else None

    def reset(self) -> None:
        """Forget what was sent: all of it is sent again."""
        self._rows.reset()

    def launch(self, plan: SchedulerOutput, started: float) -> Ticket:
        """Queue a step on the device."""
        launch = self._launch_of(plan.chunks)
        wait = self._stream.submit(partial(self._compute, launch))
        sampled = [plan.chunks[place].seq for place in launch.draw.sampled]
        collect = partial(_result, launch, sampled, wait)
        return Ticket(plan.chunks, sampled, plan.num_tokens, started, collect)

    # -- on the host ---------------------------------------------------------------------------

    def _launch_of(self, chunks: Seq[Chunk]) -> Launch:
        shape = StepShape(
            num_tokens=sum(c.length for c in chunks),
            num_seqs=len(chunks),
            width=max(len(c.seq.block_table) for c in chunks),
            max_query_len=max(c.length for c in chunks),
        )
        prompts, adapted = _prompts(chunks), self._adapted(chunks)
        graphs = None if prompts or adapted else self._graphs
        padded = None if graphs is None else graphs.padded(shape)
        shape = padded or shape
        laid_out = self._rows.lay_out(chunks, shape.num_seqs)
        return Launch(
            message=laid_out.message,
            shape=shape,
            num_seqs=len(chunks),
            graphs=graphs if padded else None,
            draw=Draw.of([chunk.seq for chunk in chunks], laid_out),
            prompts=prompts,
            adapted=adapted,
        )

    def _adapted(self, chunks: Seq[Chunk]) -> list[tuple[Adapter, list[int]]]:
        """The tokens of a step that each adapter changes."""
        tokens: dict[str, list[int]] = {}
        begin = 0
        for chunk in chunks:
            if name := chunk.seq.params.adapter:
                tokens.setdefault(name, []).extend(range(begin, begin + chunk.length))
            begin += chunk.length
        return [(self._adapters[name], places) for name, places in tokens.items()]

    # -- on the device -------------------------------------------------------------------------

    def _compute(self, launch: Launch) -> Tensors:
        """The tokens drawn [S], log probabilities of those asked for, and those of prompts."""
        from tokenmill.kernels import batch_rows

        received = self._rows.receive(launch.message)
        head, count = received.head, launch.num_seqs
        buffers, hidden = self._hidden(launch, head)
        told = self._told(launch, hidden[launch.shape.num_seqs :])
        tokens, logprobs = self._drawn(launch, hidden[:count], received, buffers)
        batch_rows.advance(
            head.rows[:count],
            head.starts[: count + 1],
            received.is_sampled,
            tokens,
            tokens=self._rows.tokens,
            computed=self._rows.computed,
        )
        return tokens, *logprobs, *told

    def _hidden(self, launch: Launch, head: Head) -> tuple[StepBuffers, torch.Tensor]:
        """The step's tensors, and its last hidden states: of sequences, then of prompts."""
        shape = launch.shape
        if launch.graphs is not None:
            return launch.graphs.run(shape, head)
        buffers = StepBuffers(self._rows, shape.num_seqs, shape.num_tokens)
        also = [index for prompt in launch.prompts for index in prompt.indices]
        batch = buffers.build(
            shape,
            head,
            also=self._sent(also) if also else None,
            adapted=[(adapter, self._sent(places)) for adapter, places in launch.adapted],
        )
        return buffers, self._runner.hidden(batch)

    def _drawn(
        self, launch: Launch, hidden: torch.Tensor, received: Received, buffers: StepBuffers
    ) -> tuple[torch.Tensor, Tensors]:
        """A token for each sequence [S], of use for those drawn for, and what is told of them."""
        if not launch.draw.sampled:
            return torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device), ()
        logits = self._runner.narrow_logits_of(hidden)
        return self._sampler.draw(
            launch.draw, logits, received, buffers.context_lens[: len(hidden)]
        )

    def _told(self, launch: Launch, hidden: torch.Tensor) -> Tensors:
        """Of the prompts: slices of logits, so that a long one takes no more memory."""
        told: list[torch.Tensor] = []
        begin = 0
        for prompt in launch.prompts:
            for part in slices(len(prompt.indices), self._runner.vocab_size):
                logits = self._runner.logits_of(hidden[begin + part.start : begin + part.stop])
                chosen = self._sent(prompt.token_ids[part])
                told += measure(logits, chosen, prompt.num_top)
            begin += len(prompt.indices)
        return tuple(told)

    def _sent(self, numbers: Seq[int]) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self._runner.device)


def _prompts(chunks: Seq[Chunk]) -> list[Prompt]:
    """What the chunks tell of prompts; it counts as told."""
    prompts, begin = [], 0
    for chunk in chunks:
        positions, seq = prompt_positions(chunk), chunk.seq
        if positions:
            indices = [begin + p - chunk.start for p in positions]
            prompts.append(Prompt(seq, indices, [seq.token_ids[p + 1] for p in positions]))
            seq.num_told_tokens = positions[-1] + 2
        begin += chunk.length
    return prompts


def _result(launch: Launch, seqs: Seq[Sequence], wait: Wait) -> StepResult:
    """What the tensors of `_compute` say, once they are there."""
    tokens, *measured = wait()
    draw = launch.draw
    drawn: list[int] = tokens[draw.sampled].tolist()
    logprobs: dict[int, TokenLogprobs] = {}
    if draw.asked:
        ids = tokens[draw.asked].tolist()
        logprobs = dict(zip(draw.asked, told_of(ids, *measured[:3]), strict=True))
        measured = measured[3:]
    sampled: list[Sampled] = [
        (seq, token, _cut(logprobs.get(place), seq.params.logprobs or 0))
        for seq, token, place in zip(seqs, drawn, draw.sampled, strict=True)
    ]
    told = []
    for prompt in launch.prompts:
        rows: list[TokenLogprobs] = []
        while len(rows) < len(prompt.token_ids):
            ids = prompt.token_ids[len(rows) : len(rows) + len(measured[0])]
            rows += told_of(ids, *measured[:3])
            measured = measured[3:]
        told.append((prompt.seq, tuple(rows)))
    return StepResult(told, sampled)


def _cut(logprobs: TokenLogprobs | None, num_top: int) -> TokenLogprobs | None:
    return logprobs and replace(logprobs, top=logprobs.top[:num_top])
