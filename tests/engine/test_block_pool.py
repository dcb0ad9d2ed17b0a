"""BlockPool: what is allocated is distinct, freed comes back, known is found, errors are seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.block_pool import BlockPool, extend_hashes


@given(st.lists(st.integers(0, 6), max_size=60))
def test_blocks_are_conserved(requests: list[int]) -> None:
    pool = BlockPool(16, 4)
    tables: list[list[int]] = []
    for size in requests:
        if size <= pool.num_free:
            tables.append(pool.allocate(size))
        elif tables:
            pool.free(tables.pop(0))
        pool.check_integrity(tables)
    assert pool.num_free == 16 - sum(map(len, tables))


def test_asking_for_more_than_is_free_is_refused() -> None:
    with pytest.raises(ValueError, match="5 blocks asked for, 4 free"):
        BlockPool(4, 1).allocate(5)


@pytest.mark.parametrize(
    ("tables", "freed"),
    [([[0, 1], [1]], []), ([[0, 1]], [1]), ([[0]], [])],
    ids=["shared", "both", "lost"],
)
def test_integrity_sees_broken_books(tables: list[list[int]], freed: list[int]) -> None:
    pool = BlockPool(4, 1)
    pool.allocate(2)
    pool.free(freed)
    with pytest.raises(RuntimeError, match="do not add up"):
        pool.check_integrity(tables)


def test_blocks_for_rounds_up() -> None:
    assert [BlockPool(1, 16).blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def hashes_of(tokens: list[int], block_size: int = 2) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, block_size)
    return hashes


def test_a_hash_stands_for_everything_before_it() -> None:
    first, other = hashes_of([1, 2, 3, 4, 5]), hashes_of([9, 2, 3, 4])
    assert len(first) == 2, "the last block is not full"
    assert not set(first) & set(other)
    assert hashes_of([1, 2, 3, 4, 7, 8])[:2] == first


def test_hashes_grow_with_the_tokens() -> None:
    hashes = hashes_of([1, 2, 3])
    extend_hashes(hashes, [1, 2, 3, 4, 5, 6], 2)
    assert hashes == hashes_of([1, 2, 3, 4, 5, 6])


def fill(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Compute a sequence of full blocks and let it go."""
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.remember(block, block_hash)
    pool.free(blocks)
    return blocks


def test_the_longest_known_prefix_is_found_and_shared() -> None:
    pool = BlockPool(8, 2)
    blocks = fill(pool, hashes_of([1, 2, 3, 4, 5, 6]))
    assert pool.num_free == 8
    found = pool.match(hashes_of([1, 2, 3, 4, 7, 7]))
    assert found == blocks[:2]
    pool.share(found)
    pool.share(found)
    pool.check_integrity([found, found])
    pool.free(found)
    assert pool.num_free == 6
    pool.free(found)
    assert pool.num_free == 8
    pool.check_integrity([])


def test_the_longest_unused_is_evicted_first_and_the_end_of_a_prefix_before_its_begin() -> None:
    pool = BlockPool(6, 2)
    old, new = hashes_of([1, 2, 3, 4]), hashes_of([5, 6, 7, 8])
    fill(pool, old)
    kept = fill(pool, new)
    held = pool.allocate(2)  # the blank ones
    assert (pool.match(old), pool.match(new)) != ([], [])
    held += pool.allocate(1)
    assert len(pool.match(old)) == 1
    held += pool.allocate(1)
    assert pool.match(old) == []
    assert pool.match(new) == kept
    pool.check_integrity([held])


def test_the_first_of_equal_blocks_is_kept() -> None:
    pool = BlockPool(4, 2)
    (block_hash,) = hashes_of([1, 2])
    first, second = pool.allocate(2)
    pool.remember(first, block_hash)
    pool.remember(second, block_hash)
    assert pool.match([block_hash]) == [first]
    pool.free([first, second])
    pool.check_integrity([])
    assert pool.num_cached == 1


def test_what_is_forgotten_is_not_found_and_every_block_is_free() -> None:
    pool = BlockPool(4, 2)
    idle, used = hashes_of([1, 2, 3, 4]), hashes_of([5, 6])
    fill(pool, idle)
    (block,) = pool.allocate(1)
    pool.remember(block, used[0])
    pool.forget()
    assert pool.match(idle) == pool.match(used) == []
    pool.check_integrity([[block]])
    pool.free([block])
    pool.check_integrity([])
    assert pool.num_free == 4


def test_without_caching_nothing_is_known() -> None:
    pool = BlockPool(4, 2, is_caching=False)
    hashes = hashes_of([1, 2, 3, 4])
    fill(pool, hashes)
    assert pool.match(hashes) == []
