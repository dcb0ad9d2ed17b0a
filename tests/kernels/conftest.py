"""Where the Triton kernels run: compiled on a GPU, interpreted on the CPU where there is none."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import accumulate

import pytest
import torch

# Triton reads this when a kernel is defined, that is when its module is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Float32 sums differ only in their order; the others by one rounding of the result, and in
# attention by the rounding of the weights to that dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tensors handed to a Triton kernel."""
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("needs a CUDA device and no TRITON_INTERPRET")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled in this run; set TRITON_INTERPRET=1 to interpret them")
    return torch.device(request.param)


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Compare with the tolerance of the dtype; a NaN never passes."""

    def compare(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.dtype == expected.dtype
        tolerance = TOLERANCE[expected.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    return compare


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and empty_like return with NaN: an element not written then shows.

    Integers of 32 bits become those of a NaN that computing with raises a warning.
    """
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.int32:
            return tensor.fill_(0x7FA00001)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **kwargs: fill(empty_like(*args, **kwargs))
    )


@dataclass(frozen=True)
class AttentionCase:
    """The arguments of one paged attention call."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    max_query_len: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    def run(
        self, attend: Callable[..., torch.Tensor], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return attend(
            values.pop("q"), values.pop("k_cache"), values.pop("v_cache"), **values, out=out
        )


@pytest.fixture
def attention_case() -> Callable[..., AttentionCase]:
    """Build a call from (chunk length, context length) pairs.

    Blocks lie in shuffled order, every cache element that no sequence owns is NaN, and q is a view
    of a fused qkv tensor.
    """

    def build(
        chunks: list[tuple[int, int]],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> AttentionCase:
        generator = torch.Generator().manual_seed(len(chunks) + head_dim)
        num_heads, num_kv_heads = heads
        counts = [-(-context // block_size) for _, context in chunks]
        numbers = torch.randperm(sum(counts) + 2, generator=generator).tolist()
        shape = (len(numbers), block_size, num_kv_heads, head_dim)
        caches = torch.full((2, *shape), float("nan"))
        tables = torch.zeros(len(chunks), max(counts), dtype=torch.int32)
        for row, (count, (_, context)) in enumerate(zip(counts, chunks, strict=True)):
            for column in range(count):
                block = numbers.pop()
                tables[row, column] = block
                filled = min(block_size, context - column * block_size)
                content = torch.randn(2, filled, *shape[2:], generator=generator)
                caches[:, block, :filled] = content
        lengths = [length for length, _ in chunks]
        fused = torch.randn(
            sum(lengths), num_heads + 2 * num_kv_heads, head_dim, generator=generator
        ).to(device, dtype)
        return AttentionCase(
            q=fused[:, :num_heads],
            k_cache=caches[0].to(device, dtype),
            v_cache=caches[1].to(device, dtype),
            cu_seqlens_q=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            context_lens=torch.tensor([c for _, c in chunks], dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            max_query_len=max(lengths),
            scale=head_dim**-0.5,
        )

    return build
