"""The scheduler's contract as properties of random traffic, and under adversarial traffic.

`TOKENMILL_SCHEDULES` sets how many schedules are drawn; `make properties` draws 12,000.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmill.engine import scheduler as scheduler_module
from tokenmill.engine.admission import MARGIN
from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.cost_model import CostFit, CostModel
from tokenmill.engine.scheduler import Policy, Scheduler, SchedulerOutput
from tokenmill.engine.sequence import Sequence, SequenceStatus
from tokenmill.engine.step import MIN_CHUNK, Step
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

SCHEDULES = int(os.environ.get("TOKENMILL_SCHEDULES", "500"))


@dataclass(frozen=True)
class Arrival:
    """A sequence that comes before step `step`; equal contents are equal prompts."""

    step: int
    content: int
    prompt: int
    output: int
    priority: int
    #: Cancelled this many steps later; 0: never.
    cancel_after: int


@dataclass(frozen=True)
class Traffic:
    """Sequences, and the scheduler they meet."""

    arrivals: list[Arrival]
    blocks: int
    block_size: int
    budget: int
    rows: int
    is_caching: bool
    #: Output lengths that the scheduler believes in at first: wrong ones make it preempt.
    believed: int
    #: How often a sequence that does not fit is passed.
    max_passes: int = scheduler_module.MAX_PASSES
    #: Seconds of a step; its cost is COST.
    max_step_s: float = math.inf
    #: Tokens that a query sees, in all layers.
    window: int | None = None


#: A step takes 1 s, 0.1 s more for a token, and 0.01 s more for each that attention reads.
COST = CostFit(fixed_s=1.0, token_s=0.1, kv_token_s=0.01)


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    block_size = draw(st.integers(1, 8))
    blocks = draw(st.integers(2, 24))
    room = blocks * block_size
    rows = draw(st.integers(1, 6))
    is_crowded = draw(st.booleans())  # short prompts with long outputs: many lose their blocks
    arrival = st.builds(
        Arrival,
        step=st.integers(0, 2 if is_crowded else 30),
        content=st.integers(0, 3),
        prompt=st.integers(1, min(block_size + 1, room - 1) if is_crowded else room - 1),
        output=st.integers(1, 40),
        priority=st.integers(0, 2),
        cancel_after=st.sampled_from([0, 0, 0, 1, 5]),
    )
    return Traffic(
        sorted(draw(st.lists(arrival, min_size=1, max_size=12)), key=lambda a: a.step),
        blocks,
        block_size,
        rows + draw(st.integers(0, 32)),
        rows,
        draw(st.booleans()),
        1 if is_crowded else draw(st.sampled_from([1, 4, 256])),
        draw(st.sampled_from([1, 2, 64])),
        draw(st.sampled_from([math.inf, math.inf, 2.0, 4.0])),
        draw(st.none() | st.integers(1, 3 * block_size)),
    )


class Watched(Scheduler):
    """Checks admissions and preemptions at the moment when they are decided."""

    window: int | None
    step: Step
    asking: Sequence
    passed_before: dict[Sequence, int]

    def schedule(self) -> SchedulerOutput:
        self.passed_before = {seq: seq.times_passed for seq in self.waiting}
        return super().schedule()

    def fill_waiting(self, step: Step, *, whole: bool = False) -> None:
        self.step = step
        super().fill_waiting(step, whole=whole)

    def _admit(self, seq: Sequence, cached: list[int], passed: Iterable[Sequence]) -> None:
        self.check_admission(seq, cached)
        self.check_order(seq, list(passed))
        self.check_passes(passed)
        super()._admit(seq, cached, passed)

    def _take(self, step: Step, seq: Sequence, length: int) -> None:
        self.asking = seq
        super()._take(step, seq, length)

    def _preempt(self, step: Step, seq: Sequence) -> None:
        self.check_victims(seq)
        super()._preempt(step, seq)

    def check_admission(self, seq: Sequence, cached: list[int]) -> None:
        """To its expected end it fits beside what the running ones will ask for."""
        promised = sum(self.expected(s) - len(s.held_blocks) for s in self.running)
        own = self.expected(seq) - sum(self.pool.num_references(b) > 0 for b in set(cached))
        margin = -(-self.pool.num_blocks // MARGIN)
        assert not self.running or own + promised + margin <= self.pool.num_free

    def check_order(self, seq: Sequence, passed: list[Sequence]) -> None:
        """Who is as urgent and came before is blocked, or waits for what this step computes."""
        for other in self.waiting:
            if other.priority <= seq.priority and int(other.seq_id) < int(seq.seq_id):
                contents = {s.token_ids[0] for s in self.step.lengths}
                waits = self.pool.is_caching and other.token_ids[0] in contents
                assert waits or other in passed

    def check_passes(self, passed: Iterable[Sequence]) -> None:
        """Nobody is passed in a step who had been passed often enough before it."""
        for seq in passed:
            assert self.passed_before[seq] < scheduler_module.MAX_PASSES

    def check_victims(self, victim: Sequence) -> None:
        """Never the first, nor one before who asks; of the least urgent, the least to redo."""
        behind = [s for s in self.running if s.order > self.asking.order and s.block_table]
        least = max(s.priority for s in behind)
        assert victim in behind
        assert victim.priority == least
        assert self.redone(victim) == min(self.redone(s) for s in behind if s.priority == least)

    def expected(self, seq: Sequence) -> int:
        output = self.output_lengths.expect(seq.num_output_tokens)
        tokens = min(seq.num_prompt_tokens + output, seq.max_num_tokens)
        if self.window is not None:
            tokens = min(tokens, self.window + self.token_budget + 2 * self.pool.block_size)
        return max(-(-tokens // self.pool.block_size), len(seq.held_blocks))

    def redone(self, seq: Sequence) -> tuple[bool, int]:
        own = [b for b in seq.held_blocks if self.pool.num_references(b) == 1]
        redone = (len(own) + seq.num_dropped_blocks) * self.pool.block_size
        return not own, min(redone, seq.num_computed_tokens)


class Simulation:
    """Plays the engine, and knows for every cache slot which prefix was written to it."""

    def __init__(self, traffic: Traffic, policy: str = "splitfuse") -> None:
        self.traffic = traffic
        pool = BlockPool(traffic.blocks, traffic.block_size, is_caching=traffic.is_caching)
        cost = CostModel()
        cost.fit = COST
        self.scheduler = Watched(
            pool,
            token_budget=traffic.budget,
            max_num_seqs=traffic.rows,
            policy=Policy(policy),
            cost=cost,
            max_step_s=traffic.max_step_s,
            window=traffic.window,
        )
        self.scheduler.window = traffic.window
        self.scheduler.output_lengths.record(traffic.believed)
        self.policy = policy
        self.step = 0
        self.num_computed = 0
        self.coming = [(a, self._sequence(n, a)) for n, a in enumerate(traffic.arrivals)]
        self.alive: dict[str, Sequence] = {}
        self.cancels: list[tuple[int, Sequence]] = []
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def _sequence(self, number: int, arrival: Arrival) -> Sequence:
        room = self.traffic.blocks * self.traffic.block_size
        return Sequence(
            seq_id=str(number),
            token_ids=[arrival.content] * arrival.prompt,
            num_prompt_tokens=arrival.prompt,
            params=SamplingParams(max_tokens=arrival.output),
            seed=0,
            max_num_tokens=min(arrival.prompt + arrival.output, room),
            priority=arrival.priority,
        )

    def run(self, limit: int = 20_000) -> None:
        self.check_refusal()
        with patch.object(scheduler_module, "MAX_PASSES", self.traffic.max_passes):
            self.run_to_the_end(limit)

    def check_refusal(self) -> None:
        room = self.traffic.blocks * self.traffic.block_size
        seq = self._sequence(0, Arrival(0, 1, 1, 1, 1, 0))
        seq.max_num_tokens = room + 1
        with pytest.raises(InvalidRequest, match=rf"{room} tokens .* got {room + 1}"):
            self.scheduler.add(seq)

    def run_to_the_end(self, limit: int) -> None:
        while self.coming or self.alive:
            self.turn()
            assert self.step < limit, "the work does not end"
        assert self.scheduler.pool.num_free == self.traffic.blocks
        assert not self.scheduler.running
        assert not self.scheduler.waiting

    def turn(self) -> None:
        scheduler = self.scheduler
        while self.coming and self.coming[0][0].step <= self.step:
            arrival, seq = self.coming.pop(0)
            scheduler.add(seq)
            self.alive[seq.seq_id] = seq
            if arrival.cancel_after:
                self.cancels.append((self.step + arrival.cancel_after, seq))
        for when, seq in self.cancels:
            if when == self.step and seq.seq_id in self.alive:
                scheduler.abort(seq)
                del self.alive[seq.seq_id]
        self.step += 1
        plan = scheduler.schedule()
        self.check_limits(plan)
        self.check_time(plan)
        self.compute(plan)
        self.check_window()
        scheduler.check_integrity()

    def check_limits(self, plan: SchedulerOutput) -> None:
        scheduler, traffic = self.scheduler, self.traffic
        whole_alone = self.policy == "prefill_first" and len(plan.chunks) == 1
        assert plan.num_tokens <= traffic.budget or whole_alone
        assert plan.num_tokens == sum(c.length for c in plan.chunks)
        assert len(scheduler.running) <= traffic.rows
        assert plan.chunks or not self.alive, "a step with work to do computed nothing"
        first = min((s for s in scheduler.running), key=lambda s: s.order, default=None)
        assert first not in plan.preempted
        assert len({id(c.seq) for c in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            assert chunk.seq.status is SequenceStatus.RUNNING
            assert chunk.length > 0
            assert chunk.start == chunk.seq.num_computed_tokens
            assert chunk.start + chunk.length <= chunk.seq.num_tokens
            assert len(chunk.seq.block_table) * traffic.block_size >= chunk.start + chunk.length
        scheduler.check_integrity()

    def check_time(self, plan: SchedulerOutput) -> None:
        """Prompts are cut to the time that is left, or to MIN_CHUNK where they are alone."""
        left = self.traffic.max_step_s - COST.fixed_s
        for number, chunk in enumerate(plan.chunks):
            left -= self.scheduler.cost.seconds_of(chunk.start, chunk.length)
            forced = number == 0 and chunk.length <= MIN_CHUNK
            assert chunk.length == 1 or left > -1e-9 or forced or self.policy == "prefill_first"

    def first_seen(self, position: int) -> int:
        window = self.traffic.window
        return 0 if window is None else max(0, position - window + 1)

    def check_window(self) -> None:
        """What no query can reach is given back, but for the block before the next query's."""
        size = self.traffic.block_size
        for seq in self.scheduler.running:
            held = seq.num_dropped_blocks * size
            assert held <= self.first_seen(seq.num_computed_tokens)
            kept = min(
                self.first_seen(seq.num_computed_tokens) // size,
                seq.num_computed_tokens // size - 1,
            )
            assert seq.num_dropped_blocks >= kept

    def compute(self, plan: SchedulerOutput) -> None:
        """[contents] All keys and values of a step are written, then all before them are read."""
        size = self.traffic.block_size
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.length):
                slot = (chunk.seq.block_table[position // size], position % size)
                self.slots[slot] = tuple(chunk.seq.token_ids[: position + 1])
        for chunk in plan.chunks:
            for position in range(self.first_seen(chunk.start), chunk.start + chunk.length):
                slot = (chunk.seq.block_table[position // size], position % size)
                assert self.slots[slot] == tuple(chunk.seq.token_ids[: position + 1])
        self.num_computed += plan.num_tokens
        self.scheduler.mark_computed(plan.chunks)
        for chunk in plan.chunks:
            seq = chunk.seq
            if seq.num_uncomputed_tokens == 0:
                seq.token_ids.append(100 + seq.num_tokens)
                if seq.num_tokens >= seq.max_num_tokens:
                    self.scheduler.finish(seq)
                    del self.alive[seq.seq_id]


@given(traffics(), st.sampled_from(["splitfuse"] * 4 + ["prefill_first", "static"]))
@settings(max_examples=SCHEDULES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.timeout(1200)
def test_contract_holds_on_random_traffic(traffic: Traffic, policy: str) -> None:
    """Every clause of the scheduler's docstring, each by the check that it names."""
    Simulation(traffic, policy).run()


def traffic_of(arrivals: list[Arrival], **changes: int) -> Traffic:
    defaults: dict[str, int] = {"blocks": 64, "block_size": 4, "budget": 16, "rows": 8}
    return Traffic(arrivals, **(defaults | changes), is_caching=True, believed=1)


def test_all_prompts_at_the_context_limit() -> None:
    """A prompt of all but one token of the cache, and eight of them."""
    arrivals = [Arrival(0, n, 255, 1, 1, 0) for n in range(8)]
    Simulation(traffic_of(arrivals)).run()


def test_a_cache_of_two_blocks_more_than_one_sequence_needs() -> None:
    arrivals = [Arrival(n // 3, n % 5, 20, 20, n % 3, 0) for n in range(40)]
    Simulation(traffic_of(arrivals, blocks=12)).run()


def test_a_storm_of_cancels() -> None:
    arrivals = [Arrival(n // 20, n % 7, 5 + n % 50, 30, n % 3, n % 4) for n in range(400)]
    Simulation(traffic_of(arrivals)).run()


def test_eight_copies_of_a_prompt_with_preemption() -> None:
    """Their prompt is computed once; what is recomputed is what was preempted behind it."""
    arrivals = [Arrival(0, 1, 41, 60, 1, 0) for _ in range(8)]
    simulation = Simulation(traffic_of(arrivals, blocks=40))
    simulation.run()
    assert simulation.scheduler.num_preemptions > 0
    assert simulation.num_computed < 8 * 100 + 41
