from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tokenmill.kernels import compiler, cpu_attention, reference

Attend = Callable[..., torch.Tensor]
Compare = Callable[[torch.Tensor, torch.Tensor], None]
BuildCase = Callable[..., Any]


@pytest.fixture(params=["torch", "compiled"])
def attend(request: pytest.FixtureRequest) -> Attend:
    """Both forms of attention on a CPU."""
    if request.param == "torch":
        return cpu_attention.paged_attention
    assert compiler.is_available()
    from tokenmill.kernels import compiled_attention

    return compiled_attention.paged_attention


@pytest.mark.parametrize(
    "chunks",
    [
        [(1, 1)],
        [(1, 63), (1, 1), (1, 100), (1, 7), (1, 16)],
        [(63, 63)],
        [(7, 100), (100, 100)],
        [(1, 40), (63, 70), (1, 3), (2, 2), (1, 17)],
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (8, 1)], ids=str)
def test_matches_the_reference(
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    attend: Attend,
    chunks: list[tuple[int, int]],
    heads: tuple[int, int],
) -> None:
    case = attention_case(chunks, heads=heads, head_dim=64)
    assert_close(case.run(attend), case.run(reference.paged_attention))


@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_head_dims(
    attention_case: BuildCase, assert_close: Compare, head_dim: int, attend: Attend
) -> None:
    case = attention_case([(1, 33), (7, 20), (1, 100)], head_dim=head_dim)
    assert_close(case.run(attend), case.run(reference.paged_attention))


def test_groups_of_one_sequence_and_of_many_agree(
    attention_case: BuildCase, assert_close: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = attention_case([(1, context) for context in (1, 15, 16, 17, 50, 100, 3, 100)])
    expected = case.run(reference.paged_attention)
    for group_bytes in (1, 30_000, 1 << 30):
        monkeypatch.setattr(cpu_attention, "_GROUP_BYTES", group_bytes)
        assert_close(case.run(cpu_attention.paged_attention), expected)


def test_scratch_left_by_a_larger_call_does_not_leak_into_a_smaller(
    attention_case: BuildCase, assert_close: Compare, attend: Attend
) -> None:
    for context in (200, 5, 100):
        case = attention_case([(1, context), (1, 2)])
        assert_close(case.run(attend), case.run(reference.paged_attention))


def test_works_after_a_call_in_inference_mode(
    attention_case: BuildCase, assert_close: Compare, attend: Attend
) -> None:
    case = attention_case([(1, 40), (5, 9)])
    expected = case.run(reference.paged_attention)
    with torch.inference_mode():
        assert_close(case.run(attend), expected)
    assert_close(case.run(attend), expected)


def test_writes_into_out_and_leaves_padding_rows(
    attention_case: BuildCase, assert_close: Compare, attend: Attend
) -> None:
    case = attention_case([(1, 20), (3, 9)])
    out = torch.full((6, 4, 32), 7.0)
    padded = torch.cat([case.q, torch.zeros(2, 4, 32)])
    result = attend(
        padded,
        case.k_cache,
        case.v_cache,
        cu_seqlens_q=case.cu_seqlens_q,
        context_lens=case.context_lens,
        block_tables=case.block_tables,
        max_query_len=3,
        scale=case.scale,
        out=out,
    )
    assert result is out
    assert_close(out[:4], case.run(reference.paged_attention))
    assert (out[4:] == 7.0).all()


@pytest.mark.parametrize("block_size", [16, 8])
@pytest.mark.parametrize("heads", [(4, 2), (9, 3), (8, 1), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [32, 80, 128])
def test_a_bfloat16_cache_serves_float32_queries(
    attention_case: BuildCase,
    attend: Attend,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
) -> None:
    chunks = [(1, 40), (5, 9), (1, 3), (33, 100), (1, 150)]
    case, rounded = (
        attention_case(chunks, heads=heads, head_dim=head_dim, block_size=block_size)
        for _ in range(2)
    )
    expected = reference.paged_attention(
        case.q,
        case.k_cache.bfloat16(),
        case.v_cache.bfloat16(),
        cu_seqlens_q=case.cu_seqlens_q,
        context_lens=case.context_lens,
        block_tables=case.block_tables,
        max_query_len=33,
        scale=case.scale,
    )
    actual = attend(
        rounded.q,
        rounded.k_cache.bfloat16(),
        rounded.v_cache.bfloat16(),
        cu_seqlens_q=rounded.cu_seqlens_q,
        context_lens=rounded.context_lens,
        block_tables=rounded.block_tables,
        max_query_len=33,
        scale=rounded.scale,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [1, 7, 16, 40, 1000])
def test_windows_and_soft_caps(
    attention_case: BuildCase,
    assert_close: Compare,
    poisoned: None,
    window: int,
    softcap: float | None,
    attend: Attend,
) -> None:
    if softcap and attend is not cpu_attention.paged_attention:
        pytest.skip("the compiled form leaves soft caps to the other")
    chunks = [(1, 40), (63, 70), (1, 3), (7, 7), (1, 100), (5, 90)]
    case = replace(attention_case(chunks), window=window, softcap=softcap)
    assert_close(case.run(attend), case.run(reference.paged_attention))


@pytest.mark.parametrize("window", [None, 40, 600])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_whole_in_chunks_or_alone(
    dtype: torch.dtype,
    heads: tuple[int, int],
    softcap: float | None,
    window: int | None,
    attend: Attend,
) -> None:
    """Against decoding every position in one batch, across the sizes at which BLAS changes."""
    torch.manual_seed(0)
    is_compiled = attend is not cpu_attention.paged_attention
    if is_compiled and softcap:
        pytest.skip("the compiled form leaves soft caps to the other")
    length, block_size, (hq, hkv), dim = 700, 16, heads, 32 if is_compiled else 24
    q = torch.randn(length, hq, dim)
    table = torch.randperm(60)[:44].to(torch.int32)
    keys, values = (torch.full((60, block_size, hkv, dim), torch.nan) for _ in range(2))
    keys, values = keys.to(dtype), values.to(dtype)
    for cache in (keys, values):
        cache[table.long()] = torch.randn(44, block_size, hkv, dim).to(dtype)

    def attended(chunks: list[tuple[int, int]]) -> torch.Tensor:
        sizes = torch.tensor([0, *(end - start for start, end in chunks)])
        return attend(
            torch.cat([q[start:end] for start, end in chunks]),
            keys,
            values,
            cu_seqlens_q=sizes.cumsum(0).int(),
            context_lens=torch.tensor([end for _, end in chunks], dtype=torch.int32),
            block_tables=table.expand(len(chunks), -1),
            max_query_len=int(sizes.max()),
            scale=dim**-0.5,
            window=window,
            softcap=softcap,
        )

    expected = attended([(n, n + 1) for n in range(length)])
    for size in (7, 64, 230, length):
        chunks = [(start, min(start + size, length)) for start in range(0, length, size)]
        assert torch.equal(attended(chunks), expected)
    for position in (0, 190, 200, 383, 511, 512, 699):
        alone = attended([(position, position + 1)])
        assert torch.equal(alone, expected[position : position + 1])
