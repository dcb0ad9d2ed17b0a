"""Dynamic SplitFuse (arXiv 2401.08671): what each forward pass computes. Standard library only.

A forward pass costs by its tokens, hardly by its sequences, so every step carries one token budget:
running sequences first, one token each; then unfinished prompts; then new ones. Long prompts are
split over steps, short ones fused into one.

Contract (tests/engine/test_scheduler.py and test_scheduler_properties.py)

1. A step never exceeds the token budget, `max_num_seqs`, or the free blocks. Prompts are cut so
   that it is not predicted to take longer than `max_step_s`; the decodes always go.
2. A sequence whose `max_num_tokens` the whole cache holds can finish alone; the engine caps the
   context by the cache, so there are no others.
3. A new sequence is admitted when its tokens plus its expected output fit, with a margin, beside
   what the running ones still expect to need; the first of an idle scheduler is always admitted.
4. A waiting sequence that does not fit does not block those behind it, until `MAX_PASSES` of them
   have been admitted before it: then nobody passes it.
5. Out of blocks, the running sequence that loses the least work is preempted and recomputed
   later, from what the cache still knows of it; the first in order is never a victim, so it ends,
   and then the next.
6. Sequences are tried in order of arrival; a priority is a head start of `HEAD_START` admissions
   per level, so that the lowest is overtaken for a while and not for ever.
7. An admitted sequence begins behind the blocks that the cache knows of it, its last token always
   excepted. One that would compute a block that another is computing in this step waits for it.
8. Every sequence ends, and its blocks return to the pool.
"""

import bisect
import enum
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from tokenmill.engine.block_pool import BlockPool, extend_hashes
from tokenmill.engine.cost_model import CostModel
from tokenmill.engine.output_lengths import OutputLengths
from tokenmill.engine.sequence import Sequence, SequenceStatus

#: How often a waiting sequence that does not fit is passed by later ones.
MAX_PASSES = 64
#: Waiting sequences that do not fit, after which a step looks no further.
MAX_BLOCKED = 32
#: Admissions by which a level of priority is ahead of the next.
HEAD_START = 256
#: Tokens of a prompt that a step takes if it has nothing else, whatever its time limit.
MIN_CHUNK = 16
#: Admission leaves one block in so many unspoken for.
MARGIN = 64


class Policy(enum.Enum):
    """How a step is filled; all three run in one engine, so that they can be compared."""

    #: Dynamic SplitFuse.
    SPLITFUSE = "splitfuse"
    #: Whole prompts before decodes, never in one step (vLLM in 2023). A prompt longer than the
    #: budget gets a step of its own: the one case where a step exceeds it.
    PREFILL_FIRST = "prefill_first"
    #: A batch is admitted together and runs until its last sequence ends.
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


class Step:
    """The token budget of one step, and its time limit, while it is being filled."""

    def __init__(self, budget: int, seconds_left: float, cost: CostModel) -> None:
        self.left = budget
        self.seconds_left = seconds_left
        self._cost = cost
        self.lengths: dict[Sequence, int] = {}
        self.preempted: list[Sequence] = []
        #: Who computes the full block of this hash.
        self._computing: dict[bytes, Sequence] = {}

    def most(self, seq: Sequence, start: int) -> int:
        """The longest chunk from `start` on that fits; a step with nothing else takes some."""
        most = min(seq.num_tokens - start, self.left)
        if most <= 1 or self._cost.seconds_of(start, most) <= self.seconds_left:
            return most
        sizes = range(most)
        fits = bisect.bisect_right(
            sizes, self.seconds_left, key=lambda n: self._cost.seconds_of(start, n)
        )
        return max(fits - 1, 0 if self.lengths else min(most, MIN_CHUNK))

    def take(self, seq: Sequence, length: int, block_size: int) -> None:
        self.lengths[seq] = length
        self.left -= length
        start = seq.num_computed_tokens
        self.seconds_left -= self._cost.seconds_of(start, length)
        for block_hash in seq.block_hashes[start // block_size : (start + length) // block_size]:
            self._computing.setdefault(block_hash, seq)

    def drop(self, seq: Sequence) -> None:
        length = self.lengths.pop(seq, 0)
        self.left += length
        self.seconds_left += self._cost.seconds_of(seq.num_computed_tokens, length)
        self.preempted.append(seq)

    def is_computing(self, block_hash: bytes) -> bool:
        return self._computing.get(block_hash) in self.lengths


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
        self._num_arrived = 0
        self._num_admitted = 0

    # -- what the engine asks for ------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
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
        return SchedulerOutput(chunks, sum(c.length for c in chunks), tuple(step.preempted))

    def mark_computed(self, chunks: Iterable[Chunk]) -> None:
        """The chunks of a step are in the cache: count them, and make full blocks known."""
        size = self.pool.block_size
        for chunk in chunks:
            seq = chunk.seq
            seq.num_computed_tokens += chunk.length
            full = range(chunk.start // size, seq.num_computed_tokens // size)
            if full and self.pool.is_caching:
                extend_hashes(seq.block_hashes, seq.token_ids, size)
                for index in full:
                    self.pool.remember(seq.block_table[index], seq.block_hashes[index])

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence that has ended, and learn from its length."""
        self.output_lengths.record(seq.num_output_tokens)
        self.abort(seq)

    def abort(self, seq: Sequence) -> None:
        """Remove a sequence, wherever it stands, and free its blocks."""
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        seq.status = SequenceStatus.FINISHED
        self._release(seq)

    def num_reserved_blocks(self) -> int:
        """Blocks that the running sequences are still expected to ask for."""
        return sum(self._blocks_expected(seq) - len(seq.block_table) for seq in self.running)

    def check_integrity(self) -> None:
        """Verify blocks and statuses; cheap enough for whenever the engine goes idle.

        Raises:
            RuntimeError: the books do not balance.
        """
        self.pool.check_integrity(seq.block_table for seq in self.running)
        if any(seq.block_table for seq in self.waiting):
            raise RuntimeError("a waiting sequence holds KV blocks")

    # -- how a step is filled ----------------------------------------------------------------

    def fill_running(self, step: Step, *, prefilling: bool) -> None:
        """Give running sequences their next tokens: the decodes, or the unfinished prompts."""
        for seq in list(self.running):
            if step.left <= 0:
                return
            if seq.is_prefilling is prefilling and seq.status is SequenceStatus.RUNNING:
                self._take(step, seq, step.most(seq, seq.num_computed_tokens))

    def fill_waiting(self, step: Step, *, whole: bool = False) -> None:
        """Admit waiting sequences in order while budget, rows and blocks allow."""
        passed: list[Sequence] = []
        free = self._num_unspoken_blocks()
        for seq in list(self.waiting):
            if step.left <= 0 or len(self.running) >= self.max_num_seqs:
                return
            cached = self._cached_blocks(seq)
            if self._is_being_computed(step, seq, len(cached)):
                continue
            start = len(cached) * self.pool.block_size
            length = step.most(seq, start)
            if whole and length < seq.num_tokens - start:
                if step.lengths:
                    return
                length = seq.num_tokens - start  # longer than the budget: a step of its own
            if not length:
                return
            if self._can_admit(seq, cached, free):
                self._admit(seq, cached, passed)
                self._take(step, seq, length)
                free = self._num_unspoken_blocks()
            elif seq.times_passed >= MAX_PASSES or len(passed) >= MAX_BLOCKED:
                return
            else:
                passed.append(seq)

    def admit_all(self) -> None:
        """Admit waiting sequences in order while rows and blocks allow, whatever the budget."""
        for seq in list(self.waiting):
            cached = self._cached_blocks(seq)
            if len(self.running) >= self.max_num_seqs or not self._can_admit(
                seq, cached, self._num_unspoken_blocks()
            ):
                return
            self._admit(seq, cached, ())

    # -- admission ---------------------------------------------------------------------------

    def _cached_blocks(self, seq: Sequence) -> list[int]:
        """Blocks that the cache knows of the sequence; never the one of its last token."""
        if not self.pool.is_caching:
            return []
        size = self.pool.block_size
        extend_hashes(seq.block_hashes, seq.token_ids, size)
        return self.pool.match(islice(seq.block_hashes, seq.num_skippable_tokens // size))

    def _is_being_computed(self, step: Step, seq: Sequence, index: int) -> bool:
        """Another sequence computes block `index` of this one in this step."""
        return index < seq.num_skippable_tokens // self.pool.block_size and (
            self.pool.is_caching and step.is_computing(seq.block_hashes[index])
        )

    def _num_unspoken_blocks(self) -> int:
        margin = -(-self.pool.num_blocks // MARGIN)
        return self.pool.num_free - self.num_reserved_blocks() - margin

    def _can_admit(self, seq: Sequence, cached: Iterable[int], free: int) -> bool:
        shared = sum(self.pool.num_references(block) > 0 for block in cached)
        return not self.running or self._blocks_expected(seq) - shared <= free

    def _blocks_expected(self, seq: Sequence) -> int:
        """Blocks for the sequence when it ends, as far as can be guessed now."""
        output = self.output_lengths.expect(seq.num_output_tokens)
        expected = min(seq.num_prompt_tokens + output, seq.max_num_tokens)
        return max(self.pool.blocks_for(expected), len(seq.block_table))

    def _admit(self, seq: Sequence, cached: list[int], passed: Iterable[Sequence]) -> None:
        for other in passed:
            other.times_passed += 1
        self.waiting.remove(seq)
        self.pool.share(cached)
        seq.block_table = cached
        seq.num_computed_tokens = len(cached) * self.pool.block_size
        seq.status = SequenceStatus.RUNNING
        seq.times_passed = 0
        bisect.insort(self.running, seq, key=lambda s: s.order)
        self._num_admitted += 1
        self.num_admitted_tokens += seq.num_tokens
        self.num_cached_tokens += seq.num_computed_tokens

    # -- blocks ------------------------------------------------------------------------------

    def _take(self, step: Step, seq: Sequence, length: int) -> None:
        """Schedule `length` tokens, preempting others or shrinking the chunk when out of blocks."""
        missing = self._blocks_missing(seq, length)
        while missing > self.pool.num_free:
            victim = self._victim(seq)
            if victim is None:
                break
            self._preempt(step, victim)
        if missing > self.pool.num_free:  # only what the blocks at hand can take
            room = (len(seq.block_table) + self.pool.num_free) * self.pool.block_size
            length = min(length, room - seq.num_computed_tokens)
            missing = self.pool.num_free
        if length > 0:
            seq.block_table += self.pool.allocate(missing)
            step.take(seq, length, self.pool.block_size)

    def _blocks_missing(self, seq: Sequence, length: int) -> int:
        needed = self.pool.blocks_for(seq.num_computed_tokens + length)
        return max(needed - len(seq.block_table), 0)

    def _victim(self, asking: Sequence) -> Sequence | None:
        """Of those behind `asking` in order, the lowest priority with the least work to redo."""
        behind = (s for s in self.running if s.order > asking.order and s.block_table)
        return min(behind, key=self._loss, default=None)

    def _loss(self, seq: Sequence) -> tuple[int, bool, int]:
        """Sort key of a victim: what it shares is not lost, and not won by anybody either."""
        own = sum(self.pool.num_references(block) == 1 for block in seq.block_table)
        return (-seq.priority, own == 0, min(own * self.pool.block_size, seq.num_computed_tokens))

    def _preempt(self, step: Step, seq: Sequence) -> None:
        step.drop(seq)
        self.num_preemptions += 1
        self.running.remove(seq)
        seq.status = SequenceStatus.PREEMPTED
        self._release(seq)
        bisect.insort(self.waiting, seq, key=lambda s: s.order)

    def _release(self, seq: Sequence) -> None:
        self.pool.free(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = 0


def _splitfuse(scheduler: Scheduler, step: Step) -> None:
    scheduler.fill_running(step, prefilling=False)
    scheduler.fill_running(step, prefilling=True)
    if not step.preempted:  # who just lost its blocks must not take them back in the same step
        scheduler.fill_waiting(step)


def _prefill_first(scheduler: Scheduler, step: Step) -> None:
    scheduler.fill_waiting(step, whole=True)
    if not step.lengths:
        scheduler.fill_running(step, prefilling=True)  # a chunk that the blocks had cut short
        scheduler.fill_running(step, prefilling=False)


def _static(scheduler: Scheduler, step: Step) -> None:
    if not scheduler.running:
        scheduler.admit_all()
    scheduler.fill_running(step, prefilling=True)
    if not step.lengths:
        scheduler.fill_running(step, prefilling=False)


_POLICIES: dict[Policy, Callable[[Scheduler, Step], None]] = {
    Policy.SPLITFUSE: _splitfuse,
    Policy.PREFILL_FIRST: _prefill_first,
    Policy.STATIC: _static,
}
