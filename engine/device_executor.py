"""`DeviceExecutor`: steps from rows that stay on the device, launched before the last has ended.

    launch    host     what has changed, as one message         `DeviceRows.lay_out`
              device   the step is laid out and computed, tokens are drawn and appended to the rows
    collect   host     waits for the tokens, which the next step on the device does not

What a launch needs is copied when it is launched: its sequences may change before it runs.
A request with a bias, penalties, a constraint or `min_tokens` makes the host wait at its launch.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial

import torch

from tokenmill.engine.copies import DeviceStream, Stream, Tensors, Wait, to_device
from tokenmill.engine.device_rows import DeviceRows, RowMessage
from tokenmill.engine.device_step import StepBuffers, StepShape
from tokenmill.engine.executor import Sampled, StepResult, Ticket, sampled_of
from tokenmill.engine.logprobs import measure, prompt_positions, slices, told_of
from tokenmill.engine.models.low_rank import Adapter
from tokenmill.engine.runner import Runner
from tokenmill.engine.sampler import edit
from tokenmill.engine.scheduler import Chunk, SchedulerOutput
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step_graphs import StepGraphs
from tokenmill.engine.token_counts import TokenCounts
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
    #: Those a token is drawn for, and of these: copies of whose logits are changed before.
    sampled: list[int]
    is_filtered: bool
    edited: list[tuple[int, Sequence]]
    #: Whose log probabilities are told, and how many of the likeliest tokens at the most.
    asked: list[int]
    num_top: int
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
        self._eos_token_ids = tokenizer.eos_token_ids
        self._stream = stream or DeviceStream()
        size = runner.size
        self._rows = DeviceRows(max_num_seqs, size.max_model_len, size.block_size, runner.device)
        self._graphs = StepGraphs(runner, self._rows, max_num_seqs) if is_captured else None

    def reset(self) -> None:
        """Forget what was sent: all of it is sent again."""
        self._rows.reset()

    def launch(self, plan: SchedulerOutput, started: float) -> Ticket:
        """Queue a step on the device."""
        launch = self._launch_of(plan.chunks)
        wait = self._stream.submit(partial(self._compute, launch))
        sampled = sampled_of(plan.chunks)
        collect = partial(_result, launch, sampled, wait)
        return Ticket(plan.chunks, sampled, plan.num_tokens, started, collect)

    # -- on the host ---------------------------------------------------------------------------

    def _launch_of(self, chunks: Seq[Chunk]) -> Launch:
        sampled = [n for n, c in enumerate(chunks) if c.start + c.length == c.seq.num_tokens]
        asked = [n for n in sampled if chunks[n].seq.params.logprobs is not None]
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
        return Launch(
            message=self._rows.lay_out(chunks, shape.num_seqs),
            shape=shape,
            num_seqs=len(chunks),
            graphs=graphs if padded else None,
            sampled=sampled,
            is_filtered=any(chunks[n].seq.params.is_ranked for n in sampled),
            edited=[(n, _copied(chunks[n].seq)) for n in sampled if _is_edited(chunks[n].seq)],
            asked=asked,
            num_top=max((chunks[n].seq.params.logprobs or 0 for n in asked), default=0),
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

        message = launch.message.to(self._runner.device)
        rows, starts, is_sampled = self._rows.receive(message)
        buffers, hidden = self._hidden(launch, rows, starts)
        count = launch.num_seqs
        told = self._told(launch, hidden[launch.shape.num_seqs :])
        tokens, logprobs = self._sample(launch, hidden[:count], buffers)
        batch_rows.advance(
            buffers.rows[:count],
            buffers.starts[: count + 1],
            is_sampled,
            tokens,
            tokens=self._rows.tokens,
            computed=self._rows.computed,
        )
        return tokens, *logprobs, *told

    def _hidden(
        self, launch: Launch, rows: torch.Tensor, starts: torch.Tensor
    ) -> tuple[StepBuffers, torch.Tensor]:
        """The step's tensors, and its last hidden states: of sequences, then of prompts."""
        shape = launch.shape
        if launch.graphs is not None:
            return launch.graphs.run(shape, rows, starts)
        buffers = StepBuffers(self._rows, shape.num_seqs, shape.num_tokens)
        buffers.rows.copy_(rows)
        buffers.starts.copy_(starts)
        also = [index for prompt in launch.prompts for index in prompt.indices]
        batch = buffers.build(
            shape,
            also=self._sent(also) if also else None,
            adapted=[(adapter, self._sent(places)) for adapter, places in launch.adapted],
        )
        return buffers, self._runner.hidden(batch)

    def _sample(
        self, launch: Launch, hidden: torch.Tensor, buffers: StepBuffers
    ) -> tuple[torch.Tensor, Tensors]:
        """A token for each sequence [S], of use for those drawn for, and what is told of them."""
        from tokenmill.kernels import sampling

        if not launch.sampled:
            return torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device), ()
        logits = self._runner.logits_of(hidden)
        asked = self._sent(launch.asked)
        raw = logits[asked]
        if launch.edited:
            places = self._sent([place for place, _ in launch.edited])
            changed = logits[places]
            edit(changed, [seq for _, seq in launch.edited], self._eos_token_ids)
            logits[places] = changed
        resident = self._rows
        tokens, _ = sampling.sample(
            logits,
            rows=buffers.rows[: len(hidden)],
            temperature=resident.temperature,
            top_k=resident.top_k,
            top_p=resident.top_p,
            min_p=resident.min_p,
            seeds=resident.seeds,
            positions=buffers.context_lens[: len(hidden)],
            is_filtered=launch.is_filtered,
        )
        if not launch.asked:
            return tokens, ()
        return tokens, measure(raw, tokens[asked].clamp_(min=0), launch.num_top)

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


def _is_edited(seq: Sequence) -> bool:
    params = seq.params
    has_early_end = seq.num_output_tokens < params.min_tokens
    return bool(params.logit_bias or params.has_penalties or seq.constraint or has_early_end)


def _copied(seq: Sequence) -> Sequence:
    """The sequence as it is now; what it has counted of its tokens is shared."""
    if seq.params.has_penalties and seq.counts is None:
        seq.counts = TokenCounts(seq.num_prompt_tokens)
    return replace(seq, token_ids=list(seq.token_ids))


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
    drawn: list[int] = tokens[launch.sampled].tolist()
    logprobs: dict[int, TokenLogprobs] = {}
    if launch.asked:
        ids = tokens[launch.asked].tolist()
        logprobs = dict(zip(launch.asked, told_of(ids, *measured[:3]), strict=True))
        measured = measured[3:]
    sampled: list[Sampled] = [
        (seq, token, _cut(logprobs.get(place), seq.params.logprobs or 0))
        for seq, token, place in zip(seqs, drawn, launch.sampled, strict=True)
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
