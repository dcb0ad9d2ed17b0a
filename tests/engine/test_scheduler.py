"""The scheduler's contract, one property each, over random traffic."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.scheduler import MAX_PASSES, Policy, Scheduler, SchedulerOutput
from tokenmill.engine.sequence import Sequence, SequenceStatus
from tokenmill.producer.params import SamplingParams


def make_sequence(
    name: str, prompt: int, output: int, *, priority: int = 1, resumed: int = 0
) -> Sequence:
    return Sequence(
        seq_id=name,
        token_ids=[1] * (prompt + resumed),
        num_prompt_tokens=prompt,
        params=SamplingParams(max_tokens=max(output, 1)),
        seed=0,
        max_num_tokens=prompt + output,
        priority=priority,
    )


def make_scheduler(
    *,
    blocks: int = 64,
    block_size: int = 4,
    budget: int = 16,
    rows: int = 8,
    policy: str = "splitfuse",
) -> Scheduler:
    pool = BlockPool(blocks, block_size)
    return Scheduler(pool, token_budget=budget, max_num_seqs=rows, policy=Policy(policy))


def compute(scheduler: Scheduler, plan: SchedulerOutput) -> list[Sequence]:
    """Play the engine: mark chunks computed, give each caught-up sequence a token; the ended."""
    ended = []
    for chunk in plan.chunks:
        seq = chunk.seq
        seq.num_computed_tokens += chunk.length
        if seq.num_uncomputed_tokens == 0:
            seq.token_ids.append(1)
            if seq.num_tokens >= seq.max_num_tokens:
                scheduler.finish(seq)
                ended.append(seq)
    return ended


def run(
    scheduler: Scheduler, limit: int = 100_000
) -> Iterator[tuple[SchedulerOutput, list[Sequence]]]:
    steps = 0
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        assert plan.chunks, "a step with work to do computed nothing"
        yield plan, compute(scheduler, plan)
        steps += 1
        assert steps < limit, "the work does not end"


@dataclass(frozen=True)
class Traffic:
    """Sequences as (arrival step, prompt, output, priority), and the scheduler they meet."""

    arrivals: list[tuple[int, int, int, int]]
    blocks: int
    block_size: int
    budget: int
    rows: int
    cancel_every: int


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    block_size = draw(st.integers(1, 8))
    blocks = draw(st.integers(2, 24))
    room = blocks * block_size
    rows = draw(st.integers(1, 6))
    prompt = st.integers(1, max(1, room - 1))
    arrival = st.tuples(st.integers(0, 30), prompt, st.integers(1, 40), st.integers(0, 2))
    raw = draw(st.lists(arrival, min_size=1, max_size=12))
    arrivals = [(t, p, min(o, room - p) or 1, q) for t, p, o, q in raw if p < room]
    return Traffic(
        sorted(arrivals),
        blocks,
        block_size,
        rows + draw(st.integers(0, 32)),
        rows,
        draw(st.sampled_from([0, 0, 3, 7])),
    )


@given(traffics(), st.sampled_from(["splitfuse", "prefill_first", "static"]))
@settings(max_examples=400, deadline=None)
def test_contract_holds_on_random_traffic(traffic: Traffic, policy: str) -> None:
    """Rules 1, 4, 5 and 7: limits kept, no block lost or shared, everything ends."""
    scheduler = make_scheduler(
        blocks=traffic.blocks,
        block_size=traffic.block_size,
        budget=traffic.budget,
        rows=traffic.rows,
        policy=policy,
    )
    pending = [
        (when, make_sequence(str(n), prompt, output, priority=priority))
        for n, (when, prompt, output, priority) in enumerate(traffic.arrivals)
    ]
    alive = {seq.seq_id for _, seq in pending}
    step = 0
    while alive:
        while pending and pending[0][0] <= step:
            scheduler.add(pending.pop(0)[1])
        step += 1
        assert step < 20_000, "the work does not end"
        if traffic.cancel_every and step % traffic.cancel_every == 0 and scheduler.running:
            victim = scheduler.running[step % len(scheduler.running)]
            scheduler.finish(victim)
            alive.discard(victim.seq_id)
        plan = scheduler.schedule()
        whole_alone = policy == "prefill_first" and len(plan.chunks) == 1
        assert plan.num_tokens <= traffic.budget or whole_alone
        assert plan.num_tokens == sum(c.length for c in plan.chunks)
        assert len(scheduler.running) <= traffic.rows
        assert plan.chunks or not (scheduler.running or scheduler.waiting)
        for chunk in plan.chunks:
            assert chunk.seq.status is SequenceStatus.RUNNING
            assert chunk.start == chunk.seq.num_computed_tokens
            assert len(chunk.seq.block_table) * traffic.block_size >= chunk.start + chunk.length
        scheduler.check_integrity()
        alive -= {seq.seq_id for seq in compute(scheduler, plan)}
    assert scheduler.pool.num_free == traffic.blocks
    scheduler.check_integrity()


def test_decodes_come_first_then_unfinished_prompts_then_new_ones() -> None:
    scheduler = make_scheduler(budget=10, rows=4)
    first, second = make_sequence("a", 4, 9), make_sequence("b", 30, 5)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert [(c.seq.seq_id, c.length) for c in plan.chunks] == [("a", 4), ("b", 6)]
    compute(scheduler, plan)
    scheduler.add(make_sequence("c", 3, 5))
    plan = scheduler.schedule()
    assert [(c.seq.seq_id, c.start, c.length) for c in plan.chunks] == [("a", 4, 1), ("b", 6, 9)]


def test_budget_is_filled_exactly_while_prompts_wait() -> None:
    """Long prompts are split and short ones fused, so that no step is half empty."""
    scheduler = make_scheduler(blocks=1000, budget=16, rows=8)
    for number, length in enumerate([37, 3, 5, 50, 2, 9]):
        scheduler.add(make_sequence(str(number), length, 1))
    sizes = [plan.num_tokens for plan, _ in run(scheduler)]
    assert sizes[:-1] == [16] * (len(sizes) - 1)
    assert sum(sizes) == 37 + 3 + 5 + 50 + 2 + 9


def test_equal_priority_is_served_in_order_of_arrival() -> None:
    scheduler = make_scheduler(blocks=1000, budget=8, rows=8)
    for number in range(6):
        scheduler.add(make_sequence(str(number), 6, 1))
    ended = [seq.seq_id for _, done in run(scheduler) for seq in done]
    assert ended == [str(number) for number in range(6)]


def test_higher_priority_overtakes_what_waits() -> None:
    scheduler = make_scheduler(blocks=1000, budget=4, rows=1)
    for name, priority in (("low", 2), ("normal", 1), ("high", 0)):
        scheduler.add(make_sequence(name, 4, 1, priority=priority))
    ended = [seq.seq_id for _, done in run(scheduler) for seq in done]
    assert ended == ["high", "normal", "low"]


def test_admission_waits_for_the_expected_output() -> None:
    """With 20 blocks of 4, a second sequence of 4 + 60 tokens is not let in beside the first."""
    scheduler = make_scheduler(blocks=20, budget=64, rows=8)
    scheduler.add(make_sequence("a", 4, 60))
    scheduler.add(make_sequence("b", 4, 60))
    scheduler.schedule()
    assert [s.seq_id for s in scheduler.running] == ["a"]
    assert scheduler.num_preemptions == 0


def test_expected_output_is_learnt_from_what_finished() -> None:
    scheduler = make_scheduler(blocks=20, budget=64, rows=8)
    for number in range(10):
        scheduler.add(make_sequence(str(number), 4, 2))
    list(run(scheduler))
    scheduler.add(make_sequence("a", 4, 60))
    scheduler.add(make_sequence("b", 4, 60))
    scheduler.schedule()
    assert [s.seq_id for s in scheduler.running] == ["a", "b"]


def test_a_blocked_prompt_is_passed_but_not_for_ever() -> None:
    """Small ones go on behind a large one that does not fit; after MAX_PASSES it gets its turn."""
    scheduler = make_scheduler(blocks=16, budget=16, rows=2)
    scheduler.add(make_sequence("first", 4, 8))
    compute(scheduler, scheduler.schedule())
    large = make_sequence("large", 60, 4)
    scheduler.add(large)
    ended: list[str] = []
    for number in range(3 * MAX_PASSES):
        scheduler.add(make_sequence(f"small{number}", 4, 4))
        ended += [s.seq_id for s in compute(scheduler, scheduler.schedule())]
        if large.status is SequenceStatus.RUNNING:
            break
    assert any(name.startswith("small") for name in ended), "nothing passed the blocked one"
    assert large.status is SequenceStatus.RUNNING, "the blocked one is starved"
    assert len(ended) <= MAX_PASSES + 3


def test_preemption_takes_who_loses_least_and_recomputes_it() -> None:
    scheduler = make_scheduler(blocks=8, block_size=4, budget=16, rows=3)
    for _ in range(4):  # teach it that outputs are short, so that it admits too many
        scheduler.add(make_sequence("short", 1, 1))
        list(run(scheduler))
    old, large, small = (
        make_sequence("old", 8, 20),
        make_sequence("large", 11, 9),
        make_sequence("small", 3, 9),
    )
    for seq in (old, large, small):
        scheduler.add(seq)
    preempted: list[str] = []
    ended: list[str] = []
    for plan, done in run(scheduler):
        preempted += [s.seq_id for s in plan.preempted]
        ended += [s.seq_id for s in done]
    assert preempted[0] == "small"
    assert "old" not in preempted
    assert sorted(ended) == ["large", "old", "small"]
    assert scheduler.num_preemptions == len(preempted)


def test_a_blocked_prompt_alone_is_passed_later_too() -> None:
    """Only those that overtake it count, not the steps that it has waited."""
    scheduler = make_scheduler(blocks=100, block_size=16, budget=64, rows=8)
    scheduler.add(make_sequence("running", 16, 700))
    compute(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("large", 1500, 4))
    for _ in range(3 * MAX_PASSES):
        compute(scheduler, scheduler.schedule())
    scheduler.add(make_sequence("small", 16, 4))
    plan = scheduler.schedule()
    assert [c.seq.seq_id for c in plan.chunks] == ["running", "small"]


def test_static_policy_fills_its_batch_whatever_the_budget() -> None:
    """The baseline is a whole batch, prefilled over as many steps as it takes."""
    scheduler = make_scheduler(blocks=1000, budget=16, rows=6, policy="static")
    for number in range(8):
        scheduler.add(make_sequence(str(number), 40, 5))
    scheduler.schedule()
    assert len(scheduler.running) == 6


def test_static_policy_admits_nobody_until_the_batch_has_ended() -> None:
    scheduler = make_scheduler(blocks=1000, budget=16, rows=2, policy="static")
    for number, output in enumerate([2, 9, 3]):
        scheduler.add(make_sequence(str(number), 4, output))
    ended = [seq.seq_id for _, done in run(scheduler) for seq in done]
    assert ended == ["0", "1", "2"]


def test_prefill_first_never_mixes_prompts_with_decodes() -> None:
    scheduler = make_scheduler(blocks=1000, budget=16, rows=8, policy="prefill_first")
    for number, length in enumerate([5, 9, 40, 3]):
        scheduler.add(make_sequence(str(number), length, 6))
    for plan, _ in run(scheduler):
        prefills = {c.start == 0 for c in plan.chunks}
        assert len(prefills) == 1


def test_a_budget_below_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget must be at least max_num_seqs"):
        make_scheduler(budget=4, rows=8)
