"""`BlockTables`: the blocks that sequences hold, and what the pool remembers of them. No torch.

Where every layer's attention sees a window of tokens alone, blocks that no later query reaches are
given back, and a prefix is in the cache if what is reached from its end is. A table keeps its
length: the first block held stands in for those before it, whose values have a weight of zero.

    table    [ 7  7  7  | 7  4  9 ]      3 dropped, 3 held
    query                        ^       sees back into block 7
"""

from itertools import islice

from tokenmill.engine.block_pool import BlockPool, extend_hashes
from tokenmill.engine.sequence import Sequence


class BlockTables:
    """Grows and frees the block tables of sequences, from one pool."""

    def __init__(self, pool: BlockPool, window: int | None = None) -> None:
        self._pool = pool
        self.window = window

    def cached(self, seq: Sequence) -> list[int]:
        """Blocks that the cache knows of the sequence; never the one of its last token."""
        if not self._pool.is_caching:
            return []
        self._extend_hashes(seq)
        hashes = islice(seq.block_hashes, self._num_skippable(seq))
        if self.window is None:
            return self._pool.match(hashes)
        known = [self._pool.find(block_hash) for block_hash in hashes]
        best, run = 0, 0  # the longest prefix; known blocks in a row
        for count, block in enumerate(known, 1):
            run = 0 if block is None else run + 1
            if run >= count - self._num_unreached(count * self._pool.block_size):
                best = count
        table = [
            block
            for block in known[self._num_unreached(best * self._pool.block_size) : best]
            if block is not None
        ]
        return table[:1] * (best - len(table)) + table

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
        seq.block_table = cached
        seq.num_computed_tokens = len(cached) * self._pool.block_size
        seq.num_dropped_blocks = self._num_unreached(seq.num_computed_tokens)
        seq.num_known_blocks = len(cached)
        self._pool.share(seq.held_blocks)

    def missing(self, seq: Sequence, length: int) -> int:
        """Blocks that the sequence lacks for its next `length` tokens."""
        size = self._pool.block_size
        return max(-(-(seq.num_computed_tokens + length) // size) - len(seq.block_table), 0)

    def grow(self, seq: Sequence, length: int) -> int:
        """Allocate for as many of its next `length` tokens as the pool can take; how many."""
        count = min(self.missing(seq, length), self._pool.num_free)
        seq.block_table += self._pool.allocate(count)
        room = len(seq.block_table) * self._pool.block_size
        return min(length, room - seq.num_computed_tokens)

    def mark_computed(self, seq: Sequence, length: int) -> None:
        """The next `length` tokens are in the cache: make the blocks that they fill known."""
        seq.num_computed_tokens += length
        if self._pool.is_caching:
            self._remember(seq)
        if self.window is not None:
            self._drop(seq)

    def release(self, seq: Sequence) -> None:
        """Free what the sequence holds."""
        self._pool.free(seq.held_blocks)
        seq.block_table = []
        seq.num_dropped_blocks = 0
        seq.num_known_blocks = 0
        seq.num_computed_tokens = 0

    def most_held(self, num_tokens: int, chunk: int) -> int:
        """Blocks that a sequence of `num_tokens` holds at the most, in chunks of up to `chunk`."""
        blocks = self._pool.blocks_for(num_tokens)
        if self.window is None:
            return blocks
        # The window and the chunk, the block that its begin cuts, and the one that is kept.
        return min(blocks, self._pool.blocks_for(self.window + chunk) + 2)

    def _remember(self, seq: Sequence) -> None:
        """Tell the pool of full blocks; one that ends with a pending token waits for it."""
        count = min(seq.num_computed_tokens, len(seq.token_ids)) // self._pool.block_size
        if count <= seq.num_known_blocks:
            return
        self._extend_hashes(seq)
        for index in range(seq.num_known_blocks, count):
            self._pool.remember(seq.block_table[index], seq.block_hashes[index])
        seq.num_known_blocks = count

    def _extend_hashes(self, seq: Sequence) -> None:
        size, adapter = self._pool.block_size, seq.params.adapter
        extend_hashes(seq.block_hashes, seq.token_ids, size, adapter)

    def _drop(self, seq: Sequence) -> None:
        count, table = self._num_unreached(seq.num_computed_tokens), seq.block_table
        if count > seq.num_dropped_blocks:
            self._pool.free(table[seq.num_dropped_blocks : count])
            table[:count] = [table[count]] * count
            seq.num_dropped_blocks = count

    def _num_unreached(self, position: int) -> int:
        """Blocks that no query from `position` on reaches; the one before its own is kept.

        That one is full, so that what stands in for the dropped ones has been written.
        """
        if self.window is None:
            return 0
        size = self._pool.block_size
        return max(0, min((position - self.window + 1) // size, position // size - 1))
