"""What an engine says it can take, from the books of its scheduler."""

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.capacity import capacity_of
from tokenmill.engine.scheduler import Policy, Scheduler
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.params import SamplingParams

ROWS = 16


def make_scheduler(window: int | None = None) -> Scheduler:
    return Scheduler(
        BlockPool(256, 4),
        token_budget=64,
        max_num_seqs=ROWS,
        policy=Policy.SPLITFUSE,
        window=window,
    )


def add(scheduler: Scheduler, name: str, prompt: int, *, is_blocked: bool = False) -> Sequence:
    seq = Sequence(
        seq_id=name,
        token_ids=[1] * prompt,
        num_prompt_tokens=prompt,
        params=SamplingParams(max_tokens=4),
        seed=0,
        max_num_tokens=prompt + 4,
        is_blocked=is_blocked,
    )
    scheduler.add(seq)
    return seq


def test_what_waits_for_its_constraint_takes_no_room_from_others() -> None:
    scheduler = make_scheduler()
    empty = capacity_of(scheduler)
    blocked = [add(scheduler, f"b{n}", 60, is_blocked=True) for n in range(ROWS)]
    assert capacity_of(scheduler) == empty
    blocked[0].is_blocked = False
    after = capacity_of(scheduler)
    assert after.sequences == empty.sequences - 1
    assert after.tokens == empty.tokens - 60
    assert after.blocks == empty.blocks - 15


def test_more_of_them_than_rows_are_not_asked_for() -> None:
    scheduler = make_scheduler()
    for number in range(2 * ROWS):
        add(scheduler, f"b{number}", 1, is_blocked=True)
    assert capacity_of(scheduler).sequences == 1  # a row ahead
    add(scheduler, "last", 1, is_blocked=True)
    assert capacity_of(scheduler).sequences == 0


def test_behind_a_window_what_waits_counts_as_what_it_will_hold() -> None:
    scheduler = make_scheduler(window=32)
    empty = capacity_of(scheduler)
    assert empty.kv_tokens_each == 4 * (24 + 2)  # window and budget, and two blocks
    add(scheduler, "long", 900)
    assert capacity_of(scheduler).blocks == empty.blocks - 26
    assert capacity_of(make_scheduler()).kv_tokens_each == 0
