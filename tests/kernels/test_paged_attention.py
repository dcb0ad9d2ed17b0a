from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch

from tokenmill.kernels import reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]
BuildCase = Callable[..., Any]

MIXED = [(1, 40), (7, 63), (1, 3), (2, 2), (1, 100)]


@pytest.mark.parametrize(
    "chunks", [[(1, 1)], [(1, 63), (1, 1), (1, 7)], [(63, 63)], [(7, 100)], MIXED], ids=str
)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (8, 1)], ids=str)
def test_chunks_and_groups(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    attention_case: BuildCase,
    chunks: list[tuple[int, int]],
    heads: tuple[int, int],
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = attention_case(chunks, heads=heads, device=device)
    assert_close(case.run(paged_attention), case.run(reference.paged_attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_head_dims_and_dtypes(
    device: torch.device,
    assert_close: Compare,
    attention_case: BuildCase,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 product of matrices")
    case = attention_case([(1, 33), (7, 20)], head_dim=head_dim, dtype=dtype, device=device)
    assert_close(case.run(paged_attention), case.run(reference.paged_attention))


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_block_sizes(
    device: torch.device, assert_close: Compare, attention_case: BuildCase, block_size: int
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = attention_case([(3, 70), (1, 7)], block_size=block_size, device=device)
    assert_close(case.run(paged_attention), case.run(reference.paged_attention))


def test_a_chunk_of_several_tiles(
    device: torch.device, assert_close: Compare, attention_case: BuildCase
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = attention_case([(100, 130), (1, 9)], heads=(9, 3), device=device)
    assert_close(case.run(paged_attention), case.run(reference.paged_attention))


def test_rows_behind_the_last_chunk_are_not_written(
    device: torch.device, attention_case: BuildCase
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = attention_case([(1, 20), (3, 9)], device=device)
    out = torch.full((6, 4, 32), 7.0, device=device)
    padded = torch.cat([case.q, torch.zeros(2, 4, 32, device=device)])
    rest = {
        name: getattr(case, name)
        for name in ("cu_seqlens_q", "context_lens", "block_tables", "max_query_len", "scale")
    }
    assert paged_attention(padded, case.k_cache, case.v_cache, **rest, out=out) is out
    assert not out[:4].isnan().any()
    assert (out[4:] == 7.0).all()


def test_chunks_of_one_query_can_be_left_out(
    device: torch.device, assert_close: Compare, attention_case: BuildCase
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = attention_case([(1, 20), (3, 9), (1, 5)], device=device)
    out = torch.full((5, 4, 32), 7.0, device=device)
    case.run(partial(paged_attention, skip_single=True), out=out)
    assert_close(out[1:4], case.run(reference.paged_attention)[1:4])
    assert (out[[0, 4]] == 7.0).all()


def test_more_chunks_than_are_looked_at_together(
    device: torch.device,
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokenmill.kernels import paged_attention

    monkeypatch.setattr(paged_attention, "SEARCHED", 2)
    case = attention_case([*MIXED, (70, 70), (1, 5)], device=device)
    assert_close(case.run(paged_attention.paged_attention), case.run(reference.paged_attention))


def test_int64_tables_are_refused(device: torch.device, attention_case: BuildCase) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = attention_case([(1, 3)], device=device)
    with pytest.raises(ValueError, match=r"^context_lens: expected dtype torch.int32, got"):
        paged_attention(
            case.q,
            case.k_cache,
            case.v_cache,
            cu_seqlens_q=case.cu_seqlens_q,
            context_lens=case.context_lens.long(),
            block_tables=case.block_tables,
            max_query_len=1,
            scale=1.0,
        )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [1, 7, 40, 64, 1000])
def test_windows_and_soft_caps(
    device: torch.device,
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    window: int,
    softcap: float | None,
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    chunks = [(1, 40), (63, 70), (1, 3), (7, 7), (1, 97), (5, 90)]
    case = replace(attention_case(chunks, device=device), window=window, softcap=softcap)
    assert_close(case.run(paged_attention), case.run(reference.paged_attention))


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, 3.0)])
def test_the_bits_of_a_row_are_its_own(
    device: torch.device,
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    window: int | None,
    softcap: float | None,
) -> None:
    """Alone, among others, whole, in chunks that end anywhere, and decoded."""
    from tokenmill.kernels.paged_attention import paged_attention

    head_dim, dtype = (128, torch.bfloat16) if device.type == "cuda" else (32, torch.float32)
    case = attention_case(
        [(90, 90), (40, 40)], heads=(3, 1), head_dim=head_dim, dtype=dtype, device=device
    )
    case = replace(case, window=window, softcap=softcap)
    whole = case.run(paged_attention)
    assert_close(whole, case.run(reference.paged_attention))

    def check(*pieces: tuple[int, int, int]) -> None:
        """Of sequence s the positions from `start` to `end`, for each piece."""
        places = [90 * s + p for s, start, end in pieces for p in range(start, end)]
        lengths = [0, *accumulate(end - start for _, start, end in pieces)]
        part = replace(
            case,
            q=case.q[places],
            cu_seqlens_q=torch.tensor(lengths, dtype=torch.int32, device=device),
            context_lens=torch.tensor([p[2] for p in pieces], dtype=torch.int32, device=device),
            block_tables=case.block_tables[[s for s, *_ in pieces]],
            max_query_len=max(end - start for _, start, end in pieces),
        )
        assert torch.equal(part.run(paged_attention), whole[places])

    check((0, 0, 90))
    check((1, 3, 40), (0, 0, 1))
    for cut in (1, 21, 64):
        check((0, 0, cut))
        check((0, cut, 90), (1, 0, cut % 40))
    for position in (0, 63, 64, 89):
        check((0, position, position + 1))
    check((1, 39, 40), (0, 70, 71), (0, 71, 72), (1, 20, 21))


@pytest.mark.parametrize("block_size", [16, 64])
def test_tall_tiles(
    device: torch.device,
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    block_size: int,
) -> None:
    """Those of a GPU on which they pay, with blocks that hold tiles of keys and that do not."""
    from tokenmill.kernels.paged_attention import paged_attention
    from tokenmill.kernels.tiles import Tile

    case = attention_case(
        [(70, 130), (1, 33), (50, 50)], block_size=block_size, dtype=torch.float16, device=device
    )
    attended = case.run(partial(paged_attention, tile=Tile(128, 64, 8, 3)))
    assert_close(attended, case.run(reference.paged_attention))


def test_a_scale_that_is_not_positive_is_refused(
    device: torch.device, attention_case: BuildCase
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = replace(attention_case([(1, 3)], device=device), scale=-1.0)
    with pytest.raises(ValueError, match=r"^scale: expected above 0, got -1\.0"):
        case.run(paged_attention)
