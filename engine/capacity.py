"""`Capacity`: what a scheduler can take now. Standard library only.

Sequences whose constraint is still being compiled count for nothing, so that the others go on; but
only as many as there are rows: beyond that they take room like any other, and claiming ends.
"""

from dataclasses import dataclass

from tokenmill.engine.scheduler import Scheduler

#: Steps' worth of prompt tokens, and rows, that are taken ahead so that no step is half empty.
LOOKAHEAD_STEPS, LOOKAHEAD_ROWS = 2, 1 / 16


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine can take now: prompt tokens, KV blocks of `block_size` tokens, sequences."""

    tokens: int
    blocks: int
    sequences: int
    block_size: int
    #: KV tokens that one sequence holds at the most, whatever its length; 0 for no such bound.
    kv_tokens_each: int = 0


def capacity_of(scheduler: Scheduler) -> Capacity:
    """What can be taken now; zero or more of each."""
    aside = {seq.seq_id for seq in scheduler.blocked[: scheduler.max_num_seqs]}
    waiting = [seq for seq in scheduler.waiting if seq.seq_id not in aside]
    rows = scheduler.max_num_seqs + max(1, int(scheduler.max_num_seqs * LOOKAHEAD_ROWS))
    rows -= len(scheduler.running) + len(waiting)
    if rows <= 0:  # the usual case of a busy engine, asked after every step
        return Capacity(0, 0, 0, scheduler.pool.block_size, scheduler.most_kv_tokens)
    uncomputed = [seq.num_uncomputed_tokens for seq in (*scheduler.running, *waiting)]
    backlog = sum(count for count in uncomputed if count > 1)
    decoding = sum(count <= 1 for count in uncomputed[: len(scheduler.running)])
    budget = LOOKAHEAD_STEPS * (scheduler.token_budget - decoding)
    asked = sum(scheduler.most_held(s.num_tokens) for s in waiting)
    free = scheduler.pool.num_free - scheduler.num_reserved_blocks() - asked
    return Capacity(
        tokens=max(budget - backlog, 0),
        blocks=max(free, 0),
        sequences=rows,
        block_size=scheduler.pool.block_size,
        kv_tokens_each=scheduler.most_kv_tokens,
    )
