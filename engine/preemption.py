"""`choose_victim`: which running sequence gives its blocks to another. No torch."""

from collections.abc import Iterable

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.sequence import Sequence


def choose_victim(
    running: Iterable[Sequence], asking: Sequence, pool: BlockPool
) -> Sequence | None:
    """Of those behind `asking` in order, the lowest priority with the least work to redo."""
    behind = (seq for seq in running if seq.order > asking.order and seq.block_table)
    return min(behind, key=lambda seq: (-seq.priority, *loss(seq, pool)), default=None)


def loss(seq: Sequence, pool: BlockPool) -> tuple[bool, int]:
    """Whether nobody would win a block by it, and the tokens that it would have to redo.

    What it shares with others stays computed, and is not won by anybody either.
    """
    own = sum(pool.num_references(block) == 1 for block in seq.held_blocks)
    redone = (own + seq.num_dropped_blocks) * pool.block_size
    return own == 0, min(redone, seq.num_computed_tokens)
