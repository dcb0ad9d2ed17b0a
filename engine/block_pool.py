"""`BlockPool`: which blocks of the KV cache are free. Standard library only.

A block holds the keys and values of `block_size` consecutive tokens of one sequence, in all layers.
The pool knows numbers, never tensors.
"""

from collections.abc import Iterable


class BlockPool:
    """Allocates block numbers 0 .. num_blocks - 1.

    Raises:
        ValueError: fewer than one block, or a block size below one.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end: low numbers first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks.

        Raises:
            ValueError: fewer are free; ask `num_free` first.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back."""
        self._free.extend(blocks)

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Verify that every block is free or in exactly one of `tables`.

        Raises:
            RuntimeError: a block is lost, shared, or both free and in use.
        """
        used = [block for table in tables for block in table]
        owned = sorted(used + self._free)
        if owned != list(range(self.num_blocks)):
            raise RuntimeError(
                f"KV blocks do not add up: {self.num_blocks} in all, {len(self._free)} free, "
                f"{len(used)} in block tables, {len(set(owned))} distinct"
            )
