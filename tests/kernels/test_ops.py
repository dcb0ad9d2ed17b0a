import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tokenmill.kernels import ops, reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]
BuildCase = Callable[..., Any]


def test_a_cpu_process_never_loads_triton() -> None:
    code = """
import sys, torch
from tokenmill.kernels import ops
ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
ops.gated_activation(torch.ones(2, 4), "silu")
print([name for name in sys.modules if name.partition(".")[0] == "triton"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cpu_results_match_the_references(attention_case: BuildCase, assert_close: Compare) -> None:
    x, residual = torch.randn(2, 3, 8)
    weight = torch.randn(8)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert_close(ops.gated_activation(x, "gelu"), reference.gated_activation(x, "gelu"))
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    for actual, wanted in zip(ops.add_rms_norm(x, residual, weight, 1e-5), expected, strict=True):
        assert_close(actual, wanted)
    case = attention_case([(1, 33), (7, 20)])
    assert_close(case.run(ops.paged_attention), case.run(reference.paged_attention))


def test_attention_of_other_types_and_layouts_is_torchs(
    attention_case: BuildCase, assert_close: Compare
) -> None:
    """What the compiled form would read or write wrongly."""
    case = attention_case([(1, 33), (7, 20)])
    expected = case.run(reference.paged_attention)
    blocks, size, heads, dim = case.k_cache.shape
    wide = torch.zeros(blocks, size, heads, 2 * dim)
    wide[..., :dim] = case.v_cache
    for odd in (
        {"block_tables": case.block_tables.long()},
        {"context_lens": case.context_lens.long()},
        {"cu_seqlens_q": case.cu_seqlens_q.repeat_interleave(2)[::2]},
        {"context_lens": case.context_lens.repeat_interleave(2)[::2]},
        {"q": case.q.transpose(1, 2).contiguous().transpose(1, 2)},
    ):
        assert_close(replace(case, **odd).run(ops.paged_attention), expected)
    out = torch.zeros(len(case.q), 4, 2 * dim)[..., :dim]
    case.run(ops.paged_attention, out)
    assert_close(out, expected)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        replace(case, v_cache=wide[..., :dim]).run(ops.paged_attention)


@pytest.mark.parametrize(
    "chunks", [[(1, 33), (1, 300)], [(1, 33), (7, 20), (1, 1), (2, 90), (1, 70)], [(7, 7)]], ids=str
)
def test_chunks_and_decodes_on_a_gpu_fill_one_result(
    device: torch.device,
    poisoned: None,
    attention_case: BuildCase,
    assert_close: Compare,
    chunks: list[tuple[int, int]],
) -> None:
    case = attention_case(chunks, device=device)

    def attend(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return ops._attention_on_gpu(*args, **kwargs)

    assert_close(case.run(attend), case.run(reference.paged_attention))


def test_with_fixed_tiles_decodes_on_a_gpu_are_chunks(
    device: torch.device, poisoned: None, attention_case: BuildCase
) -> None:
    from tokenmill.kernels.paged_attention import paged_attention

    case = attention_case([(1, 33), (7, 20), (1, 70)], device=device)
    attended = case.run(partial(ops._attention_on_gpu, fixed_tiles=True))
    assert torch.equal(attended, case.run(paged_attention))
    alone = replace(
        case,
        q=case.q[:1],
        cu_seqlens_q=case.cu_seqlens_q[:2],
        context_lens=case.context_lens[:1],
        block_tables=case.block_tables[:1],
        max_query_len=1,
    )
    assert torch.equal(alone.run(partial(ops._attention_on_gpu, fixed_tiles=True)), attended[:1])


@pytest.mark.parametrize("held", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_keys_and_values_of_fewer_bits_are_read_on_a_gpu(
    device: torch.device,
    attention_case: BuildCase,
    assert_close: Compare,
    held: torch.dtype,
) -> None:
    case = attention_case([(1, 33), (7, 20), (1, 300)], device=device)
    caches = {name: getattr(case, name).to(held) for name in ("k_cache", "v_cache")}
    expected = replace(case, **{name: cache.float() for name, cache in caches.items()})

    def attend(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return ops._attention_on_gpu(*args, **kwargs)

    assert_close(replace(case, **caches).run(attend), expected.run(reference.paged_attention))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_results_match_the_references(
    attention_case: BuildCase, assert_close: Compare
) -> None:
    x, residual = torch.randn(2, 3, 64, device="cuda")
    weight = torch.randn(64, device="cuda")
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    expected = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    for actual, wanted in zip(ops.add_rms_norm(x, residual, weight, 1e-5), expected, strict=True):
        assert_close(actual, wanted)
    for chunks in ([(1, 33), (7, 20)], [(1, 33), (1, 300)]):
        case = attention_case(chunks, device="cuda")
        assert_close(case.run(ops.paged_attention), case.run(reference.paged_attention))
