import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.kernels.attention_items import MOST_ROWS, items

CHUNK = st.tuples(st.integers(0, 300), st.integers(0, 2000))


def found(chunks: list[tuple[int, int]], *, group: int = 3, threads: int = 2) -> np.ndarray:
    """Items of (tokens, tokens computed before) with 3 KV heads."""
    lengths = torch.tensor([0, *(length for length, _ in chunks)], dtype=torch.int32)
    contexts = torch.tensor([sum(chunk) for chunk in chunks], dtype=torch.int32)
    starts = lengths.cumsum(0, dtype=torch.int32)
    sizes = {"group": group, "num_kv_heads": 3, "most_few": 4, "num_threads": threads}
    return items(starts, contexts, **sizes)


@given(
    chunks=st.lists(CHUNK, min_size=1, max_size=6),
    group=st.sampled_from([1, 3, 8, 300]),
    threads=st.sampled_from([1, 2, 5, 64]),
)
def test_every_token_is_in_one_item(
    chunks: list[tuple[int, int]], group: int, threads: int
) -> None:
    seen, start = [], 0
    for sequence, (length, before) in enumerate(chunks):
        seen += [(sequence, start + token, before + token) for token in range(length)]
        start += length
    covered = []
    for sequence, row, before, tokens in found(chunks, group=group, threads=threads).tolist():
        assert 1 <= tokens <= max(1, MOST_ROWS // group)
        covered += [(sequence, row + token, before + token) for token in range(tokens)]
    assert sorted(covered) == seen


def test_chunks_begin_with_the_longest_and_decoding_rows_end() -> None:
    table = found([(1, 50), (250, 1000), *[(1, 200)] * 9])
    works = [tokens * before for _, _, before, tokens in table.tolist() if tokens > 1]
    assert works == sorted(works, reverse=True)
    assert len(works) > 1
    assert table[0, 3] > 1
    assert (table[-3:, 3] == 1).all()


def test_threads_have_as_many_parts_of_a_chunk() -> None:
    for threads in (2, 3, 4):
        assert len(found([(100, 600)], threads=threads)) * 3 % threads == 0
