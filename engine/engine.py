"""`Engine`: sequences in, one forward pass at a time, tokens out. No queue, no text."""

import time
from collections import deque
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

import torch

from tokenmill.engine.adapters import load_adapters
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.capacity import Capacity, capacity_of
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.constraint import Constraint, ConstraintCompiler
from tokenmill.engine.cost_model import CostModel, Timing
from tokenmill.engine.deterministic import fix_tiles
from tokenmill.engine.executor import Ticket
from tokenmill.engine.executors import make_executor
from tokenmill.engine.kv_cache import choose_kv_cache_dtype
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.messages import CacheSize
from tokenmill.engine.probe import Probe
from tokenmill.engine.runner import Runner
from tokenmill.engine.sampler import NO_TOKEN
from tokenmill.engine.scheduler import SchedulerOutput
from tokenmill.engine.sequence import FinishReason, Sequence
from tokenmill.engine.sizing import DEFAULTS, make_scheduler, max_model_len, num_kv_blocks
from tokenmill.engine.start_times import StartTimes
from tokenmill.engine.stats import EngineStats
from tokenmill.engine.timings import kept_or_timed
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.logprobs import TokenLogprobs
from tokenmill.producer.params import SamplingParams

#: An engine with nothing else to do waits this long for a constraint before it returns.
COMPILE_WAIT_S = 1.0
_NO_NUMBERS = (
    "logits must be finite for a token to be chosen, and are not: the weights of the model or of "
    "its adapter may be damaged, or the request leaves no token to choose"
)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave one sequence: new tokens, and why it ended if it did."""

    seq_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""
    #: One for each of `token_ids`, where asked for.
    logprobs: tuple[TokenLogprobs, ...] = ()
    #: Of the prompt's next tokens, from the second one on, where asked for.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Engine:
    """Continuous batching with Dynamic SplitFuse over a blocked KV cache.

    Raises:
        InvalidRequest: the configuration does not fit the model.
        OutOfMemory: the KV cache does not fit the device.
        GroupLost: another rank could not load its part of the model.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig, times: StartTimes | None = None
    ) -> None:
        #: The parts of the start: the KV cache, the steps timed, and before them the model.
        self.start_times = times or StartTimes()
        _, rows, block_size = DEFAULTS[model.device.type]
        block_size = config.block_size or block_size
        max_num_seqs = config.max_num_seqs or min(rows, config.token_budget or rows)
        self._group = model.group
        self._group.join()
        self._adapters = load_adapters(model, config.lora)
        fix_tiles(model, self._adapters.values(), is_asked=config.deterministic)
        kv_dtype = choose_kv_cache_dtype(
            config.kv_cache_dtype, model.device, model.dtype, model.quantization
        )
        num_blocks = num_kv_blocks(model, config, kv_dtype, block_size, max_num_seqs)
        self.model_name = model.name
        #: What linears are computed by, or else stored as.
        self.quantization = model.quantization
        if self.quantization == "none" and model.stored_as:
            self.quantization = model.stored_as
        self.kv_cache_dtype = str(kv_dtype).removeprefix("torch.")
        self.tokenizer = model.tokenizer
        self.max_model_len = max_model_len(config, model, num_blocks * block_size)
        # Memory for every row at full length is all that can ever be used.
        num_blocks = min(num_blocks, max_num_seqs * -(-self.max_model_len // block_size))
        size = CacheSize(num_blocks, block_size, self.max_model_len, kv_dtype)
        self._runner = Runner(model.spec, model.weights, size, model.group)
        self.start_times.end("kv_cache")
        probe = Probe(self._runner)
        cost = CostModel()
        if config.token_budget is None or config.max_step_ms is not None:
            cost.probe(kept_or_timed(model, probe, size))
        pool = BlockPool(num_blocks, block_size, is_caching=config.prefix_caching)
        self.scheduler = make_scheduler(model, config, pool, cost, max_num_seqs)
        if config.deterministic:
            probe.check_batch_invariance(self.scheduler.token_budget, max_num_seqs)
        self._constraints = ConstraintCompiler(
            model.tokenizer.to_json,
            vocab_size=model.spec.vocab_size,
            eos_token_ids=model.tokenizer.eos_token_ids,
        )
        self._executor = make_executor(self._runner, config, model, self._adapters, max_num_seqs)
        #: Steps on their way, and how many there are while the next one is planned.
        self._launched: deque[Ticket] = deque()
        self._num_ahead = int(config.async_scheduling)
        #: When the last step that drew tokens had ended.
        self._ended = 0.0
        self._sequences: dict[str, Sequence] = {}
        #: Constraints of blocked sequences, as they are compiled by a thread beside the steps.
        self._compiling: dict[str, Future[Constraint | None]] = {}
        #: Sequences that were complete when they were added: they end without a step.
        self._complete: list[Sequence] = []
        self._num_steps = 0
        self._num_computed_tokens = 0
        self._group.serve()
        self.start_times.end("steps")

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(sorted(self._adapters))

    def add(
        self,
        seq_id: str,
        prompt_ids: Seq[int],
        params: SamplingParams,
        *,
        output_ids: Seq[int] = (),
        seed: int,
        priority: int = 1,
    ) -> None:
        """Queue a sequence; `output_ids` are tokens it has generated elsewhere already.

        Raises:
            InvalidRequest: the id is taken, the prompt is empty, holds an unknown token id, or is
                longer than the context; its adapter is not loaded.
        """
        if seq_id in self._sequences:
            raise InvalidRequest("seq_id", "new to this engine", seq_id)
        if not prompt_ids:
            raise InvalidRequest("prompt", "at least one token", 0)
        if len(prompt_ids) >= self.max_model_len:
            raise InvalidRequest(
                "prompt",
                f"shorter than the context of {self.max_model_len} tokens",
                len(prompt_ids),
                "shorten it",
            )
        vocabulary, bias = self.vocab_size, max(params.logit_bias, default=0)
        if bias >= vocabulary:
            raise InvalidRequest("logit_bias", f"token ids below {vocabulary}", bias)
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocabulary:
            raise InvalidRequest("prompt", f"token ids below {vocabulary}", max(prompt_ids))
        if params.adapter and params.adapter not in self._adapters:
            loaded = ", ".join(self.adapters) or "none"
            expected = f"one of those that are loaded here ({loaded})"
            remedy = "load it with --lora NAME=DIRECTORY"
            raise InvalidRequest("adapter", expected, params.adapter, remedy)
        seq = Sequence(
            seq_id=seq_id,
            token_ids=[*prompt_ids, *output_ids],
            num_prompt_tokens=len(prompt_ids),
            params=params,
            seed=seed,
            max_num_tokens=min(len(prompt_ids) + params.max_tokens, self.max_model_len),
            priority=priority,
            # Whoever has output has been told of the prompt.
            num_told_tokens=len(prompt_ids) if output_ids else 1,
            is_blocked=params.constraint is not None,
        )
        self.scheduler.add(seq)
        self._sequences[seq_id] = seq
        if seq.is_blocked:
            self._compiling[seq_id] = self._constraints.submit(params, output_ids)
        else:
            self._start(seq)

    def compile(self, params: SamplingParams) -> None:
        """Compile the constraint of `params` and wait for it; a sequence with it starts at once.

        Raises:
            InvalidRequest: it cannot be compiled, or is too large.
        """
        if params.constraint is not None:
            self._constraints.submit(params).result()

    def abort(self, seq_id: str) -> None:
        """Forget a sequence and free its blocks; an unknown id is no error."""
        seq = self._sequences.pop(seq_id, None)
        if future := self._compiling.pop(seq_id, None):
            future.cancel()
        if seq is not None:
            self.scheduler.abort(seq)

    def capacity(self) -> Capacity:
        """What can be taken now; zero or more of each.

        Raises:
            GroupLost: another rank has gone, so that no step is possible any more.
        """
        self._group.check()
        return capacity_of(self.scheduler)

    def stats(self) -> EngineStats:
        """What the engine has done so far, and how full it is."""
        scheduler = self.scheduler
        return EngineStats(
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_admitted_tokens=scheduler.num_admitted_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_cached_blocks=scheduler.pool.num_cached,
            token_budget=scheduler.token_budget,
            cost=scheduler.cost.fit,
        )

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run one forward pass and return what it gave; an idle engine returns nothing.

        With `async_scheduling` it is what the pass before gave, while this one is on its way.

        A constraint that is being compiled holds up its own sequence alone; its error is the
        output that ends that sequence.
        """
        outputs = self._take_compiled()
        outputs += [self._end(seq, _reason(seq)) for seq in self._take_complete()]
        try:
            return outputs + self._run()
        except Exception:
            self._forget_launched()
            raise

    def close(self) -> None:
        """End the other ranks and what is being compiled; the engine is of no use after that."""
        self._constraints.close()
        self._group.close()

    def check_integrity(self) -> None:
        """Verify the scheduler's books.

        Raises:
            RuntimeError: they do not balance.
        """
        self.scheduler.check_integrity()

    def _take_compiled(self) -> list[StepOutput]:
        """Let the sequences go whose constraints are compiled, and end those that are refused."""
        if self._compiling and all(seq.is_blocked for seq in self._sequences.values()):
            wait(self._compiling.values(), COMPILE_WAIT_S, FIRST_COMPLETED)
        refused = []
        for seq_id in [key for key, future in self._compiling.items() if future.done()]:
            seq = self._sequences[seq_id]
            try:
                seq.constraint = self._compiling.pop(seq_id).result()
            except InvalidRequest as error:
                refused.append(replace(self._end(seq, FinishReason.ERROR), error=str(error)))
                continue
            self._start(seq)
        return refused

    def _start(self, seq: Sequence) -> None:
        seq.is_blocked = False
        if seq.num_tokens >= seq.max_num_tokens or (seq.constraint and seq.constraint.is_complete):
            self._complete.append(seq)

    def _take_complete(self) -> list[Sequence]:
        complete = [s for s in self._complete if s.seq_id in self._sequences]
        self._complete = []
        return complete

    def _run(self) -> list[StepOutput]:
        """Launch a step, and collect what then is more than `num_ahead` steps behind it."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan.chunks:
            self._launched.append(self._launch(plan, started))
        ahead = self._num_ahead if plan.chunks else 0
        outputs: list[StepOutput] = []
        while len(self._launched) > ahead:
            outputs += self._collect(self._launched[0])
            self._launched.popleft()
        return outputs

    def _launch(self, plan: SchedulerOutput, started: float) -> Ticket:
        ticket = self._executor.launch(plan, started)
        self.scheduler.mark_computed(plan.chunks)
        for seq in ticket.sampled:
            seq.num_pending_tokens += 1
        self._num_steps += 1
        self._num_computed_tokens += plan.num_tokens
        return ticket

    def _collect(self, ticket: Ticket) -> list[StepOutput]:
        """What a step gave those that have not ended since it was launched."""
        result = ticket.collect()
        ended = time.perf_counter()
        if ticket.sampled:  # the tokens are on the host: it has ended, and it began behind the last
            seconds = ended - max(ticket.started, self._ended)
            self.scheduler.cost.observe(Timing(ticket.num_tokens, ticket.kv_tokens, seconds))
            self._ended = ended
        outputs = [
            StepOutput(seq.seq_id, (), prompt_logprobs=rows)
            for seq, rows in result.told
            if self._sequences.get(seq.seq_id) is seq
        ]
        for seq, token, logprobs in result.sampled:
            if self._sequences.get(seq.seq_id) is seq:
                seq.num_pending_tokens -= 1
                outputs.append(self._advance(seq, token, logprobs))
        return outputs

    def _forget_launched(self) -> None:
        """A step failed: what was on its way is lost, and computed again for whoever stays."""
        self._executor.reset()
        for seq in self._sequences.values():
            seq.num_pending_tokens = 0
        if self._launched:
            self._launched.clear()
            self.scheduler.restart()

    def _advance(self, seq: Sequence, token: int, told: TokenLogprobs | None) -> StepOutput:
        if token == NO_TOKEN:
            return replace(self._end(seq, FinishReason.ERROR), error=_NO_NUMBERS)
        ends = token in seq.params.stop_token_ids or (
            token in self.tokenizer.eos_token_ids and not seq.params.ignore_eos
        )
        if ends:
            return self._end(seq, FinishReason.STOP)
        if seq.constraint is not None and not seq.constraint.accept([token]):
            return replace(self._end(seq, FinishReason.ERROR), error=_failed(seq))
        seq.token_ids.append(token)
        logprobs = () if told is None else (told,)
        if len(seq.token_ids) >= seq.max_num_tokens or (
            seq.constraint and seq.constraint.is_complete
        ):
            return self._end(seq, _reason(seq), (token,), logprobs)
        return StepOutput(seq.seq_id, (token,), logprobs=logprobs)

    def _end(
        self,
        seq: Sequence,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> StepOutput:
        del self._sequences[seq.seq_id]
        seq.num_pending_tokens = 0  # what is drawn for it from here on is dropped
        self._compiling.pop(seq.seq_id, None)
        self.scheduler.finish(seq)
        return StepOutput(seq.seq_id, tokens, reason, logprobs=logprobs)


def _reason(seq: Sequence) -> FinishReason:
    """Why a sequence ends that can have no more tokens."""
    is_complete = seq.constraint is not None and seq.constraint.is_complete
    return FinishReason.STOP if is_complete else FinishReason.LENGTH


def _failed(seq: Sequence) -> str:
    field, _ = seq.params.constraint or ("", "")
    return f"{field} must be less costly: {seq.constraint and seq.constraint.error}"
