"""BlockPool: what is allocated is distinct, what is freed comes back, errors are found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.block_pool import BlockPool


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
