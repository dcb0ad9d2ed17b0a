"""`BlockTables`: the blocks that sequences hold, and what the pool remembers of them. No torch."""

from itertools import islice

from tokenmill.engine.block_pool import BlockPool, extend_hashes
from tokenmill.engine.sequence import Sequence


class BlockTables:
    """Grows and frees the block tables of sequences, from one pool."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def cached(self, seq: Sequence) -> list[int]:
        """Blocks that the cache knows of the sequence; never the one of its last token."""
        if not self._pool.is_caching:
            return []
        extend_hashes(seq.block_hashes, seq.token_ids, self._pool.block_size)
        return self._pool.match(islice(seq.block_hashes, self._num_skippable(seq)))

    def next_hash(self, seq: Sequence, cached: list[int]) -> bytes | None:
        """The hash of the first block that is not `cached`, if it need not be computed again."""
        if not self._pool.is_caching or len(cached) >= self._num_skippable(seq):
            return None
        return seq.block_hashes[len(cached)]

    def _num_skippable(self, seq: Sequence) -> int:
        """Blocks that need not be computed if the cache knows them."""
        return seq.num_skippable_tokens // self._pool.block_size

    def begin(self, seq: Sequence, cached: list[int]) -> None:
        """Give the sequence the blocks that are `cached` of it: behind them it begins."""
        self._pool.share(cached)
        seq.block_table = cached
        seq.num_computed_tokens = len(cached) * self._pool.block_size

    def missing(self, seq: Sequence, length: int) -> int:
        """Blocks that the sequence lacks for its next `length` tokens."""
        needed = self._pool.blocks_for(seq.num_computed_tokens + length)
        return max(needed - len(seq.block_table), 0)

    def grow(self, seq: Sequence, length: int) -> int:
        """Allocate for as many of its next `length` tokens as the pool can take; how many."""
        count = min(self.missing(seq, length), self._pool.num_free)
        seq.block_table += self._pool.allocate(count)
        room = len(seq.block_table) * self._pool.block_size
        return min(length, room - seq.num_computed_tokens)

    def mark_computed(self, seq: Sequence, length: int) -> None:
        """The next `length` tokens are in the cache: make the blocks that they fill known."""
        size, start = self._pool.block_size, seq.num_computed_tokens
        seq.num_computed_tokens += length
        full = range(start // size, seq.num_computed_tokens // size)
        if full and self._pool.is_caching:
            extend_hashes(seq.block_hashes, seq.token_ids, size)
            for index in full:
                self._pool.remember(seq.block_table[index], seq.block_hashes[index])

    def release(self, seq: Sequence) -> None:
        """Free what the sequence holds."""
        self._pool.free(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = 0
