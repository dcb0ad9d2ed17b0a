"""Dynamic SplitFuse (arXiv 2401.08671): what each forward pass computes. Standard library only.

A forward pass costs by its tokens, hardly by its sequences, so every step carries one token budget:
running sequences first, one token each; then unfinished prompts; then new ones. Long prompts are
split over steps, short ones fused into one.

Contract (every schedule of test_scheduler_properties.py is checked for each clause, by the check in
brackets; test_scheduler.py has examples)

1. A step never exceeds the token budget, `max_num_seqs`, or the free blocks [limits]. Prompts are
   cut so that it is not predicted to take longer than `max_step_s`; the decodes always go [time].
2. A sequence that the whole cache cannot hold is refused at once, with the numbers; any other could
   finish alone [refusal].
3. A sequence is admitted when its tokens plus its expected output fit, with a margin, beside what
   the running ones still expect to need; the first of an idle scheduler always is [admission].
4. A waiting sequence that does not fit does not block those behind it, until `MAX_PASSES` of them
   have been admitted before it: then nobody passes it [passes].
5. Out of blocks, the running sequence that loses the least work is preempted and recomputed later,
   from what the cache still knows of it; the first in order is never a victim [victims].
6. Sequences are tried in order of arrival; a priority is a head start of `HEAD_START` admissions
   per level, so that the lowest is overtaken for a while and not for ever [order].
7. An admitted sequence begins behind the blocks that the cache knows of it, its last token always
   excepted. One that would compute a block that another computes in this step waits [contents].
8. A step with work to do computes something, every sequence ends, and its blocks return [end].
   With a `window` they return when no query reaches them any more [window].

Beside this file: `policies.py`, `step.py` (what fits a step), `admission.py`, `preemption.py`.
"""

import bisect
import enum
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenmill.engine.admission import Admission
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.block_table import BlockTables
from tokenmill.engine.cost_model import CostModel
from tokenmill.engine.output_lengths import OutputLengths
from tokenmill.engine.policies import prefill_first, splitfuse, static
from tokenmill.engine.preemption import choose_victim
from tokenmill.engine.sequence import Sequence, SequenceStatus
from tokenmill.engine.step import Step
from tokenmill.producer.errors import InvalidRequest

#: How often a waiting sequence that does not fit is passed by later ones.
MAX_PASSES = 64
#: Waiting sequences that do not fit, after which a step looks no further.
MAX_BLOCKED = 32
#: Admissions by which a level of priority is ahead of the next.
HEAD_START = 256


class Policy(enum.Enum):
    """How a step is filled; all three run in one engine, so that they can be compared."""

    SPLITFUSE = "splitfuse"
    #: A prompt longer than the budget gets a step of its own: the one that exceeds it.
    PREFILL_FIRST = "prefill_first"
    STATIC = "static"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + length) of a sequence, computed in one step."""

    seq: Sequence
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: its chunks, their tokens in all, and who lost its blocks for them."""

    chunks: tuple[Chunk, ...]
    num_tokens: int
    preempted: tuple[Sequence, ...]


class Scheduler:
    """Decides which tokens each step computes; owns the block tables."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        token_budget: int,
        max_num_seqs: int,
        policy: Policy,
        cost: CostModel | None = None,
        max_step_s: float = math.inf,
        window: int | None = None,
    ) -> None:
        if max_num_seqs > token_budget:
            raise ValueError(
                f"token_budget must be at least max_num_seqs ({max_num_seqs}), got {token_budget}; "
                "raise --token-budget or lower --max-num-seqs"
            )
        self.pool = pool
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.cost = cost or CostModel()
        self.max_step_s = max_step_s
        self.output_lengths = OutputLengths()
        self.num_preemptions = 0
        #: Tokens of all admitted sequences, and those of them that were in the cache.
        self.num_admitted_tokens = 0
        self.num_cached_tokens = 0
        self._fill = _POLICIES[policy]
        self._tables = BlockTables(pool, window)
        self._admission = Admission(
            pool, self._tables, self.running, self.output_lengths, token_budget
        )
        self._num_arrived = 0
        self._num_admitted = 0

    # -- what the engine asks for ------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidRequest: the whole cache does not hold it at its full length.
        """
        room = self.pool.num_blocks * self.pool.block_size
        if seq.max_num_tokens > room:
            raise InvalidRequest(
                "max_num_tokens",
                f"at most the {room} tokens that the KV cache holds",
                seq.max_num_tokens,
                "shorten the prompt, lower max_tokens or raise --kv-cache-memory",
            )
        self._num_arrived += 1
        seq.order = (self._num_admitted + seq.priority * HEAD_START, self._num_arrived)
        bisect.insort(self.waiting, seq, key=lambda s: s.order)

    def schedule(self) -> SchedulerOutput:
        """Fill one step and allocate the blocks that its chunks write to."""
        step = Step(self.token_budget, self.max_step_s - self.cost.fit.fixed_s, self.cost)
        self._fill(self, step)
        chunks = tuple(
            Chunk(seq, seq.num_computed_tokens, length) for seq, length in step.lengths.items()
        )
        return SchedulerOutput(chunks, self.token_budget - step.left, tuple(step.preempted))

    def mark_computed(self, chunks: Iterable[Chunk]) -> None:
        """The chunks of a step are in the cache, or on their way: count them.

        Full blocks become known; a step that is launched later finds them computed.
        """
        for chunk in chunks:
            self._tables.mark_computed(chunk.seq, chunk.length)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence that has ended, and learn from its length."""
        self.output_lengths.record(seq.num_output_tokens)
        self.abort(seq)

    def abort(self, seq: Sequence) -> None:
        """Remove a sequence, wherever it stands, and free its blocks."""
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        seq.status = SequenceStatus.FINISHED
        self._tables.release(seq)

    def restart(self) -> None:
        """Take all running sequences back to the waiting ones: what was computed is lost.

        So is what the cache knows: some of it was only on its way.
        """
        for seq in list(self.running):
            self._requeue(seq)
        self.pool.forget()

    @property
    def blocked(self) -> list[Sequence]:
        """Those that wait for something beside room."""
        return [seq for seq in self.waiting if seq.is_blocked]

    def most_held(self, num_tokens: int) -> int:
        """Blocks that a sequence of `num_tokens` holds at the most."""
        return self._tables.most_held(num_tokens, self.token_budget)

    @property
    def most_kv_tokens(self) -> int:
        """What one sequence holds at the most, whatever its length; 0 without a window."""
        if self._tables.window is None:
            return 0
        return self.most_held(sys.maxsize) * self.pool.block_size

    def num_reserved_blocks(self) -> int:
        """Blocks that the running sequences are still expected to ask for."""
        return self._admission.num_reserved_blocks()

    def check_integrity(self) -> None:
        """Verify blocks and statuses; cheap enough for whenever the engine goes idle.

        Raises:
            RuntimeError: the books do not balance.
        """
        self.pool.check_integrity(seq.held_blocks for seq in self.running)
        if any(seq.block_table for seq in self.waiting):
            raise RuntimeError("a waiting sequence holds KV blocks")

    # -- how a step is filled ----------------------------------------------------------------

    def fill_running(self, step: Step, *, prefilling: bool) -> None:
        """Give running sequences their next tokens: the decodes, or the unfinished prompts."""
        for seq in list(self.running):
            if step.left <= 0:
                return
            if (
                seq.is_prefilling is prefilling
                and seq.status is SequenceStatus.RUNNING
                and not (seq.num_pending_tokens and seq.is_awaited)
            ):
                self._take(step, seq, step.most(seq, seq.num_computed_tokens))

    def fill_waiting(self, step: Step, *, whole: bool = False) -> None:
        """Admit waiting sequences in order while budget, rows and blocks allow."""
        if not self.waiting or step.left <= 0 or len(self.running) >= self.max_num_seqs:
            return
        admission, passed = self._admission, list[Sequence]()
        free = admission.num_unspoken_blocks()
        for seq in self._unblocked():
            if step.left <= 0 or len(self.running) >= self.max_num_seqs:
                return
            cached = self._tables.cached(seq)
            if step.is_computing(self._tables.next_hash(seq, cached)):
                continue
            start = len(cached) * self.pool.block_size
            length = step.most(seq, start)
            if whole and length < seq.num_tokens - start:
                if step.lengths:
                    return
                length = seq.num_tokens - start  # longer than the budget: a step of its own
            if not length:
                return
            if admission.fits(seq, cached, free):
                self._admit(seq, cached, passed)
                self._take(step, seq, length)
                free = admission.num_unspoken_blocks()
            elif seq.times_passed >= MAX_PASSES or len(passed) >= MAX_BLOCKED:
                return
            else:
                passed.append(seq)

    def _unblocked(self) -> list[Sequence]:
        return [seq for seq in self.waiting if not seq.is_blocked]

    def admit_all(self) -> None:
        """Admit waiting sequences in order while rows and blocks allow, whatever the budget."""
        for seq in self._unblocked():
            cached = self._tables.cached(seq)
            free = self._admission.num_unspoken_blocks()
            if len(self.running) >= self.max_num_seqs or not self._admission.fits(
                seq, cached, free
            ):
                return
            self._admit(seq, cached, ())

    def _admit(self, seq: Sequence, cached: list[int], passed: Iterable[Sequence]) -> None:
        for other in passed:
            other.times_passed += 1
        self.waiting.remove(seq)
        self._tables.begin(seq, cached)
        seq.status = SequenceStatus.RUNNING
        seq.times_passed = 0
        bisect.insort(self.running, seq, key=lambda s: s.order)
        self._num_admitted += 1
        self.num_admitted_tokens += seq.num_tokens
        self.num_cached_tokens += seq.num_computed_tokens

    def _take(self, step: Step, seq: Sequence, length: int) -> None:
        """Schedule `length` tokens, preempting others or shrinking the chunk when out of blocks."""
        missing = self._tables.missing(seq, length)
        while missing > self.pool.num_free:
            victim = choose_victim(self.running, seq, self.pool)
            if victim is None:
                break
            self._preempt(step, victim)
        if missing:
            length = self._tables.grow(seq, length)
        if length > 0:
            step.take(seq, length, self.pool.block_size)

    def _preempt(self, step: Step, seq: Sequence) -> None:
        step.drop(seq)
        self.num_preemptions += 1
        self._requeue(seq)

    def _requeue(self, seq: Sequence) -> None:
        self.running.remove(seq)
        seq.status = SequenceStatus.PREEMPTED
        self._tables.release(seq)
        bisect.insort(self.waiting, seq, key=lambda s: s.order)


_POLICIES: dict[Policy, Callable[[Scheduler, Step], None]] = {
    Policy.SPLITFUSE: splitfuse,
    Policy.PREFILL_FIRST: prefill_first,
    Policy.STATIC: static,
}
