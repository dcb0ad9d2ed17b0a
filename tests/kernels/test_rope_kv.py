import math
from collections.abc import Callable

import pytest
import torch

from tokenmill.kernels import reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]

BLOCKS, BLOCK_SIZE = 8, 16


def arguments(
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(tokens)
    fused = torch.randn(tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    fused = fused.to(device, dtype)
    q, k, v = torch.split(fused, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = torch.outer(torch.arange(50.0), torch.rand(rotary_dim // 2, generator=generator))
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=generator)[:tokens]
    slots[1::5] = -1
    shape = (2, BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    caches = torch.full(shape, math.nan, dtype=dtype, device=device)
    return [
        q,
        k,
        v,
        torch.randint(0, 50, (tokens,), generator=generator).to(device),
        torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
        slots.to(device),
        *caches,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "rotary_dim"),
    [
        (1, (1, 1), 32, 32),
        (7, (9, 3), 64, 64),
        (7, (4, 1), 80, 32),
        (3, (8, 1), 128, 128),
        (4, (2, 2), 80, 80),
    ],
)
def test_matches_the_reference(
    device: torch.device,
    assert_close: Compare,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.rope_kv import rope_store_kv

    expected = arguments(tokens, heads, head_dim, rotary_dim, dtype, device)
    actual = arguments(tokens, heads, head_dim, rotary_dim, dtype, device)
    reference.rope_store_kv(*expected)
    rope_store_kv(*actual)
    for index in (0, 1, 2):
        assert_close(actual[index], expected[index])
    for index in (6, 7):  # NaN exactly where nothing is stored
        assert torch.equal(actual[index].isnan(), expected[index].isnan())
        assert_close(actual[index].nan_to_num(), expected[index].nan_to_num())


def test_a_head_dim_that_differs_from_the_cache_is_named(device: torch.device) -> None:
    from tokenmill.kernels.rope_kv import rope_store_kv

    q, k, v, positions, cos_sin, slots, k_cache, v_cache = arguments(
        3, (2, 1), 32, 32, torch.float32, device
    )
    with pytest.raises(
        ValueError, match=r"^k_cache: expected shape \[.*1, 32\], got \[8, 16, 1, 16"
    ):
        rope_store_kv(q, k, v, positions, cos_sin, slots, k_cache[..., :16], v_cache[..., :16])
