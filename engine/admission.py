"""`Admission`: whether a waiting sequence's blocks fit beside those of the running. No torch."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.block_table import BlockTables
from tokenmill.engine.output_lengths import OutputLengths
from tokenmill.engine.sequence import Sequence

#: Admission leaves one block in so many unspoken for.
MARGIN = 64


class Admission:
    """Answers from what is expected of the `running` sequences, the scheduler's own list."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        running: Seq[Sequence],
        output_lengths: OutputLengths,
        token_budget: int,
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._token_budget = token_budget
        self._running = running
        self._output_lengths = output_lengths

    def num_reserved_blocks(self) -> int:
        """Blocks that the running sequences are still expected to ask for."""
        return sum(map(self._blocks_missing, self._running))

    def num_unspoken_blocks(self) -> int:
        """Free blocks that nobody is expected to ask for, but for the margin."""
        margin = -(-self._pool.num_blocks // MARGIN)
        return self._pool.num_free - self.num_reserved_blocks() - margin

    def fits(self, seq: Sequence, cached: Iterable[int], unspoken: int) -> bool:
        """Whether it fits to its expected end; the first of an idle scheduler always does."""
        shared = sum(self._pool.num_references(block) > 0 for block in set(cached))
        return not self._running or self.blocks_expected(seq) - shared <= unspoken

    def blocks_expected(self, seq: Sequence) -> int:
        """Blocks that the sequence will hold at the most, as far as can be guessed now."""
        return self._blocks_missing(seq) + len(seq.block_table) - seq.num_dropped_blocks

    def _blocks_missing(self, seq: Sequence) -> int:
        """What it lacks of them."""
        output = self._output_lengths.expect(seq.num_output_tokens)
        expected = min(seq.num_prompt_tokens + output, seq.max_num_tokens)
        most = self._tables.most_held(expected, self._token_budget)
        return max(most - len(seq.block_table) + seq.num_dropped_blocks, 0)
