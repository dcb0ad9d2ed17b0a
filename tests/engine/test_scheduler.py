"""The scheduler's contract by example; test_scheduler_properties.py has random traffic."""

from collections.abc import Iterator
from itertools import count

import pytest

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.cost_model import CostModel, Timing
from tokenmill.engine.scheduler import (
    HEAD_START,
    MAX_PASSES,
    Policy,
    Scheduler,
    SchedulerOutput,
)
from tokenmill.engine.sequence import Sequence, SequenceStatus
from tokenmill.engine.step import MIN_CHUNK
from tokenmill.producer.params import SamplingParams

_contents = count()


def make_sequence(
    name: str, prompt: int, output: int, *, priority: int = 1, content: int | None = None
) -> Sequence:
    """A sequence of its own content, or of one that others share."""
    return Sequence(
        seq_id=name,
        token_ids=[next(_contents) if content is None else -content] * prompt,
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
    scheduler.mark_computed(plan.chunks)
    for chunk in plan.chunks:
        seq = chunk.seq
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


def test_the_lowest_priority_is_overtaken_and_not_starved() -> None:
    """Whatever the load of the highest: after its head start is used up, the lowest is next."""
    scheduler = make_scheduler(blocks=1000, budget=4, rows=1)
    low = make_sequence("low", 4, 1, priority=2)
    scheduler.add(make_sequence("first", 4, 1, priority=0))
    scheduler.add(low)
    ended = 0
    while low.status is not SequenceStatus.FINISHED:
        scheduler.add(make_sequence("high", 4, 1, priority=0))
        ended += len(compute(scheduler, scheduler.schedule()))
        assert ended <= 2 * HEAD_START + 2
    assert ended >= 2 * HEAD_START


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


def test_what_is_cached_is_not_computed_again_but_for_the_last_token() -> None:
    """Blocks of 4: of the same 16 tokens 12 are cached, of 18 with the same begin 16."""
    scheduler = make_scheduler(blocks=100, budget=64)
    scheduler.add(make_sequence("a", 16, 1, content=1))
    list(run(scheduler))
    same, longer = (
        make_sequence("same", 16, 1, content=1),
        make_sequence("longer", 18, 1, content=1),
    )
    scheduler.add(same)
    scheduler.add(longer)
    plan = scheduler.schedule()
    assert [(c.start, c.length) for c in plan.chunks] == [(12, 4), (16, 2)]
    assert same.block_table[:3] == longer.block_table[:3]
    assert (scheduler.num_admitted_tokens, scheduler.num_cached_tokens) == (16 + 34, 12 + 16)


def test_equal_prompts_of_one_step_are_computed_once() -> None:
    """The others wait for the first, while what shares nothing with it goes on beside it."""
    scheduler = make_scheduler(blocks=100, budget=64)
    for number in range(4):
        scheduler.add(make_sequence(str(number), 18, 5, content=1))
    scheduler.add(make_sequence("other", 18, 5))
    plans = [plan for plan, _ in run(scheduler)]
    assert [(c.seq.seq_id, c.length) for c in plans[0].chunks] == [("0", 18), ("other", 18)]
    assert [(c.start, c.length) for c in plans[1].chunks[2:]] == [(16, 2)] * 3


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    scheduler = make_scheduler(blocks=20, budget=64)
    scheduler.output_lengths.record(1)
    first, second = make_sequence("first", 20, 40), make_sequence("second", 30, 20)
    scheduler.add(first)
    scheduler.add(second)
    starts = [
        chunk.start
        for plan, _ in run(scheduler)
        for chunk in plan.chunks
        if chunk.seq is second and chunk.length > 1
    ]
    assert scheduler.num_preemptions == 1
    assert starts[0] == 0
    assert starts[1] > 0


def test_without_caching_everything_is_computed() -> None:
    pool = BlockPool(100, 4, is_caching=False)
    scheduler = Scheduler(pool, token_budget=64, max_num_seqs=8, policy=Policy.SPLITFUSE)
    for number in range(3):
        scheduler.add(make_sequence(str(number), 16, 1, content=1))
    assert scheduler.schedule().num_tokens == 48


def test_a_cancelled_sequence_teaches_nothing_about_lengths() -> None:
    scheduler = make_scheduler()
    seq = make_sequence("a", 4, 60)
    scheduler.add(seq)
    before = scheduler.output_lengths.expect()
    compute(scheduler, scheduler.schedule())
    scheduler.abort(seq)
    assert scheduler.output_lengths.expect() == before


def make_limited(max_step_s: float) -> Scheduler:
    """Steps of 1 s, and 0.1 s more for each token; reading keys is free."""
    cost = CostModel()
    cost.probe([Timing(n, k, 1 + 0.1 * n) for n in (1, 20, 50) for k in (0, 1000)])
    return Scheduler(
        BlockPool(1000, 4),
        token_budget=100,
        max_num_seqs=20,
        policy=Policy.SPLITFUSE,
        cost=cost,
        max_step_s=max_step_s,
    )


def test_a_prompt_is_cut_so_that_the_step_keeps_its_time_limit() -> None:
    scheduler = make_limited(6.05)
    scheduler.add(make_sequence("a", 90, 5))
    scheduler.add(make_sequence("b", 90, 5))
    sizes = [plan.num_tokens for plan, _ in run(scheduler)]
    assert sizes[:3] == [50, 50, 50]
    assert sum(sizes) == 180 + 2 * 4
    assert max(sizes) == 50


def test_decodes_go_whatever_the_time_limit_and_a_prompt_alone_goes_on() -> None:
    scheduler = make_limited(1.2)
    for number in range(4):
        scheduler.add(make_sequence(str(number), 16, 2))
    plans = [plan for plan, _ in run(scheduler)]
    assert plans[0].num_tokens == MIN_CHUNK
    assert all(plan.num_tokens <= MIN_CHUNK for plan in plans)


def test_a_budget_below_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget must be at least max_num_seqs"):
        make_scheduler(budget=4, rows=8)
