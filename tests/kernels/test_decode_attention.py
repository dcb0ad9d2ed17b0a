from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tokenmill.kernels import reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]
BuildCase = Callable[..., Any]

#: One key, ends just before, at and behind a tile's and a part's, and one key before a window.
CONTEXTS = [1, 32, 63, 65, 97, 200]


def decode(
    case: Any, part: int = 64, out: torch.Tensor | None = None, parts: int | None = None
) -> torch.Tensor:
    from tokenmill.kernels.decode_attention import decode_attention

    return decode_attention(
        case.q,
        case.k_cache,
        case.v_cache,
        cu_seqlens_q=case.cu_seqlens_q,
        context_lens=case.context_lens,
        block_tables=case.block_tables,
        scale=case.scale,
        window=case.window,
        softcap=case.softcap,
        part=part,
        parts=parts,
        out=out,
    )


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (20, 1)], ids=str)
def test_contexts_and_groups(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    attention_case: BuildCase,
    heads: tuple[int, int],
) -> None:
    case = attention_case([(1, c) for c in CONTEXTS], heads=heads, device=device)
    assert_close(decode(case), case.run(reference.paged_attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "head_dim", [32, 80, 256, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 96, 128))]
)
def test_head_dims_and_dtypes(
    device: torch.device,
    assert_close: Compare,
    attention_case: BuildCase,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 product of matrices")
    case = attention_case([(1, 70), (1, 20)], head_dim=head_dim, dtype=dtype, device=device)
    assert_close(decode(case), case.run(reference.paged_attention))


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_block_sizes(
    device: torch.device, assert_close: Compare, attention_case: BuildCase, block_size: int
) -> None:
    case = attention_case([(1, 70), (1, 129)], block_size=block_size, device=device)
    assert_close(decode(case), case.run(reference.paged_attention))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 64, 130, pytest.param(1000, marks=pytest.mark.slow)])
def test_windows_and_soft_caps(
    device: torch.device,
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    window: int | None,
    softcap: float | None,
) -> None:
    case = attention_case([(1, c) for c in CONTEXTS], device=device)
    case = replace(case, window=window, softcap=softcap)
    assert_close(decode(case), case.run(reference.paged_attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_in_fp8(
    device: torch.device, assert_close: Compare, attention_case: BuildCase, dtype: torch.dtype
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a device with fp8")
    case = attention_case([(1, 70), (1, 9), (1, 33)], dtype=dtype, device=device)
    caches = (
        cache.nan_to_num(0.0).to(torch.float8_e4m3fn) for cache in (case.k_cache, case.v_cache)
    )
    case = replace(case, **dict(zip(("k_cache", "v_cache"), caches, strict=True)))
    expected = case.run(reference.paged_attention)
    assert_close(decode(case), expected)
    assert_close(case.run(paged_attention), expected)


def test_the_part_that_is_used(
    device: torch.device, assert_close: Compare, attention_case: BuildCase
) -> None:
    from tokenmill.kernels.decode_attention import PART

    case = attention_case([(1, PART + 3), (1, 2 * PART), (1, 5)], device=device)
    assert_close(decode(case, PART), case.run(reference.paged_attention))


def test_longer_chunks_and_padding_are_not_written(
    device: torch.device, attention_case: BuildCase, assert_close: Compare
) -> None:
    case = attention_case([(1, 70), (3, 9), (1, 3)], device=device)
    expected = case.run(reference.paged_attention)
    padded = replace(
        case,
        q=torch.cat([case.q, case.q]),
        cu_seqlens_q=torch.cat([case.cu_seqlens_q, case.cu_seqlens_q[-1:]]),
        context_lens=torch.cat([case.context_lens, torch.zeros_like(case.context_lens[:1])]),
        block_tables=torch.cat([case.block_tables, torch.zeros_like(case.block_tables[:1])]),
    )
    out = torch.full((10, 4, 32), 7.0, device=device)
    assert decode(padded, out=out) is out
    assert_close(out[[0, 4]], expected[[0, 4]])
    assert (out[[1, 2, 3, 5, 6, 7, 8, 9]] == 7.0).all()


def test_bits_depend_on_neither_the_batch_nor_the_width_of_the_tables(
    device: torch.device, attention_case: BuildCase
) -> None:
    case = attention_case([(1, 140), (1, 200), (1, 3)], device=device)
    together = decode(case)
    alone = replace(
        case,
        q=case.q[:1],
        cu_seqlens_q=case.cu_seqlens_q[:2],
        context_lens=case.context_lens[:1],
        block_tables=case.block_tables[:1, : -(-140 // 16)],
    )
    assert torch.equal(together[:1], decode(alone))


@pytest.mark.parametrize("window", [None, 150])
def test_bits_do_not_depend_on_how_many_parts_a_program_takes(
    device: torch.device,
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
) -> None:
    """Contexts of a group, one more key, less, and more groups than are merged at once."""
    from tokenmill.kernels import decode_attention, merge_parts

    monkeypatch.setattr(decode_attention, "GROUP", 4)
    monkeypatch.setattr(merge_parts, "GROUP", 4)
    monkeypatch.setattr(merge_parts, "AT_ONCE", 2)
    case = attention_case([(1, c) for c in (128, 129, 5, 600)], heads=(2, 1), device=device)
    case = replace(case, window=window)
    expected = decode(case, 32, parts=1)
    assert_close(expected, case.run(reference.paged_attention))
    for parts in (2, 4):
        assert torch.equal(decode(case, 32, parts=parts), expected)
    short = replace(  # whose tables hold no more than a group: no second kernel
        case,
        q=case.q[:3:2],
        cu_seqlens_q=case.cu_seqlens_q[:3],
        context_lens=case.context_lens[:3:2].contiguous(),
        block_tables=case.block_tables[:3:2, :8],
    )
    for parts in (1, 4):
        assert torch.equal(decode(short, 32, parts=parts), expected[:3:2])


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((1, 8, 2), 1), ((1, 8, 128), 2), ((64, 8, 2), 2), ((64, 8, 4), 4), ((256, 8, 128), 16)],
)
def test_programs_take_more_parts_where_there_are_many(
    shape: tuple[int, int, int], parts: int
) -> None:
    from tokenmill.kernels.decode_attention import choose_parts

    assert choose_parts(*shape, processors=132) == parts
