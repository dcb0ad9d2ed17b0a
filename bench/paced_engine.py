"""`PacedEngine`: the real scheduler around steps that only take their time."""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.capacity import Capacity, capacity_of
from tokenmill.engine.engine import StepOutput
from tokenmill.engine.planning.device import Device
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import FinishReason, Sequence
from tokenmill.producer.params import SamplingParams


class NumberTokenizer:
    """Token ids as decimal text."""

    def encode(self, text: str) -> list[int]:
        return [int(item) for item in text.split()]

    def decode(self, token_ids: Seq[int]) -> str:
        return " ".join(map(str, token_ids))

    def apply_chat_template(
        self, messages: Seq[dict[str, str]], tools: Seq[object] = ()
    ) -> list[int]:
        return [len(messages)]


@dataclass
class Spent:
    """Where the time of a worker that had something to do went, in seconds, and its steps."""

    #: What the steps were modelled to take.
    modelled_s: float = 0.0
    #: What they took: scheduling and the sleep, which oversleeps a little.
    stepping_s: float = 0.0
    #: Between two steps: what the queue, the loop and the interpreter took.
    between_s: float = 0.0
    steps: int = 0
    tokens: int = 0


class PacedEngine:
    """An engine for `worker.loop` that sleeps through each step."""

    model_name, quantization, kv_cache_dtype = "paced", "none", "float32"

    def __init__(self, device: Device) -> None:
        shape = device.engine
        self.tokenizer = NumberTokenizer()
        self.spent = Spent()
        pool = BlockPool(shape.kv_tokens // shape.block_size, shape.block_size, is_caching=False)
        self.max_model_len = pool.num_blocks * pool.block_size
        self._cost = device.cost
        self._scheduler = Scheduler(
            pool,
            token_budget=shape.token_budget,
            max_num_seqs=shape.max_num_seqs,
            policy=shape.policy,
            cost=device.cost.cost_model(shape.token_budget),
        )
        self._sequences: dict[str, Sequence] = {}
        self._ended_at: float | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(
        self,
        seq_id: str,
        prompt_ids: Seq[int],
        params: SamplingParams,
        *,
        output_ids: Seq[int],
        seed: int,
        priority: int,
    ) -> None:
        seq = Sequence(
            seq_id=seq_id,
            token_ids=[*prompt_ids, *output_ids],
            num_prompt_tokens=len(prompt_ids),
            params=params,
            seed=seed,
            max_num_tokens=len(prompt_ids) + params.max_tokens,
            priority=priority,
        )
        self._sequences[seq_id] = seq
        self._scheduler.add(seq)

    def abort(self, seq_id: str) -> None:
        seq = self._sequences.pop(seq_id, None)
        if seq is not None:
            self._scheduler.abort(seq)

    def capacity(self) -> Capacity:
        return capacity_of(self._scheduler)

    def close(self) -> None:
        """Nothing runs beside it."""

    def step(self) -> list[StepOutput]:
        began = time.perf_counter()
        if self._ended_at is not None:
            self.spent.between_s += began - self._ended_at
        output = self._scheduler.schedule()
        seconds = self._cost.seconds((chunk.start, chunk.length) for chunk in output.chunks)
        self._scheduler.mark_computed(output.chunks)
        done = [self._advance(c.seq) for c in output.chunks if not c.seq.num_uncomputed_tokens]
        time.sleep(max(began + seconds - time.perf_counter(), 0.0))
        now = time.perf_counter()
        self.spent.modelled_s += seconds
        self.spent.stepping_s += now - began
        self.spent.steps += 1
        self.spent.tokens += len(done)
        self._ended_at = now if self.has_work else None
        return done

    def _advance(self, seq: Sequence) -> StepOutput:
        seq.token_ids.append(7)
        if seq.num_tokens < seq.max_num_tokens:
            return StepOutput(seq.seq_id, (7,))
        del self._sequences[seq.seq_id]
        self._scheduler.finish(seq)
        return StepOutput(seq.seq_id, (7,), FinishReason.LENGTH)
