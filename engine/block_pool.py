"""`BlockPool`: which blocks of the KV cache are free, shared or remembered. Standard library only.

A block holds the keys and values of `block_size` consecutive tokens, in all layers. The pool knows
numbers, never tensors. A full block is known by the hash of all tokens up to its end, so a block
with the same hash holds the same keys and values, whoever computed them. With an adapter
they are others, so the adapter's name is where its chain begins:

    hash 0 = H(adapter, tokens 0 .. 31)    hash 1 = H(hash 0, tokens 32 .. 63)    ...

| a block is | referenced | known | goes next                                                    |
| ---------- | ---------- | ----- | ------------------------------------------------------------ |
| blank      | no         | no    | to whoever asks, before any idle one                         |
| in use     | by tables  | maybe | blank, or idle if it is known, when the last table lets go   |
| idle       | no         | yes   | in use again by a match; blank if evicted, the oldest first  |
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile

#: Bytes of a hash: at 128 bits, nobody meets two different prefixes with the same one.
HASH_BYTES = 16


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size: int, adapter: str = ""
) -> None:
    """Append to `hashes` those of the full blocks of `token_ids` that it does not have yet."""
    parent = hashes[-1] if hashes else _digest(adapter.encode()) if adapter else b""
    for end in range((len(hashes) + 1) * block_size, len(token_ids) + 1, block_size):
        tokens = array("q", token_ids[end - block_size : end]).tobytes()
        parent = _digest(parent + tokens)
        hashes.append(parent)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()


class BlockPool:
    """Hands out block numbers 0 .. num_blocks - 1; without `is_caching` it remembers none.

    Raises:
        ValueError: fewer than one block, or a block size below one.
    """

    def __init__(self, num_blocks: int, block_size: int, *, is_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.is_caching = is_caching
        self._blank = list(range(num_blocks - 1, -1, -1))  # popped from the end: low numbers first
        self._references = [0] * num_blocks
        self._known: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        #: Known and unreferenced, in the order in which they are evicted.
        self._idle: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: blank or idle."""
        return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that a match can find."""
        return len(self._known)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, forgetting idle ones where the blank ones do not suffice.

        Raises:
            ValueError: fewer are free; ask `num_free` first.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of one reference to each of `blocks`, a table in its order."""
        for block in reversed(blocks):  # a prefix outlives what follows it
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._hashes:
                self._idle[block] = None
            else:
                self._blank.append(block)

    # -- what is remembered --------------------------------------------------------------------

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix; nothing is taken yet."""
        found = map(self.find, hashes)
        return [b for b in takewhile(lambda block: block is not None, found) if b is not None]

    def find(self, block_hash: bytes) -> int | None:
        """The block of this hash, if it is known; nothing is taken yet."""
        return self._known.get(block_hash)

    def share(self, blocks: Iterable[int]) -> None:
        """Take a reference to each of `blocks`, which a `match` has just found."""
        for block in blocks:
            self._idle.pop(block, None)
            self._references[block] += 1

    def remember(self, block: int, block_hash: bytes) -> None:
        """Make a full, computed block in use known; the first of equal ones is kept."""
        if self.is_caching and block_hash not in self._known and block not in self._hashes:
            self._known[block_hash] = block
            self._hashes[block] = block_hash

    def forget(self) -> None:
        """Know nothing any more: idle blocks become blank, those in use unknown."""
        self._blank += self._idle
        self._idle.clear()
        self._known.clear()
        self._hashes.clear()

    def num_references(self, block: int) -> int:
        """Tables that hold the block."""
        return self._references[block]

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        del self._known[self._hashes.pop(block)]
        return block

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Verify references against `tables`, and that each block is blank, idle or in use.

        Raises:
            RuntimeError: a block is lost, in two states, or its references are miscounted.
        """
        used = Counter(block for table in tables for block in table)
        owned = sorted([*used, *self._blank, *self._idle])
        known = {block: block_hash for block_hash, block in self._known.items()}
        if (
            owned != list(range(self.num_blocks))
            or any(count != used[block] for block, count in enumerate(self._references))
            or known != self._hashes
            or not known.keys() >= self._idle.keys()
        ):
            raise RuntimeError(
                f"KV blocks do not add up: {self.num_blocks} in all, {len(self._blank)} blank, "
                f"{len(self._idle)} idle, {len(used)} in block tables, {len(set(owned))} distinct, "
                f"{sum(self._references)} references for {used.total()}, {len(known)} known"
            )
