import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exact_fp8 import convert_as_processors_do
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
    cache_dtype: torch.dtype | None = None,
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
    caches = torch.full(shape, math.nan, device=device).to(cache_dtype or dtype)
    return [
        q,
        k,
        v,
        torch.randint(0, 50, (tokens,), generator=generator).to(device),
        torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
        slots.to(device),
        *caches,
    ]


def check(
    given: list[torch.Tensor], assert_close: Compare, *norms: torch.Tensor, **scale: float
) -> list[torch.Tensor]:
    """Compare with the reference; returns the caches."""
    from tokenmill.kernels.rope_kv import rope_store_kv

    weights: dict[str, Any] = dict(zip(("q_norm", "k_norm"), norms, strict=False)) | scale
    expected, actual = ([tensor.clone() for tensor in given] for _ in range(2))
    assert_close(rope_store_kv(*actual, **weights), reference.rope_store_kv(*expected, **weights))
    for index in (6, 7):  # NaN exactly where nothing is stored
        found, wanted = actual[index].float(), expected[index].float()
        assert torch.equal(found.isnan(), wanted.isnan())
        if actual[index].dtype == torch.float8_e4m3fn:  # turned keys may round to the next one
            torch.testing.assert_close(found, wanted, rtol=0.125, atol=0.002, equal_nan=True)
        else:
            dtype = given[0].dtype
            assert_close(found.nan_to_num().to(dtype), wanted.nan_to_num().to(dtype))
    return actual[6:]


SHAPES = [
    (1, (1, 1), 32, 32),
    (7, (9, 3), 64, 64),
    (7, (4, 1), 80, 32),
    (3, (8, 1), 128, 128),
    (4, (2, 2), 80, 80),
    (2, (5, 2), 256, 64),
    (3, (71, 1), 64, 64),
    (6, (3, 3), 64, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "rotary_dim"), SHAPES)
def test_matches_the_reference(
    device: torch.device,
    assert_close: Compare,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
) -> None:
    check(arguments(tokens, heads, head_dim, rotary_dim, dtype, device), assert_close)


@pytest.mark.parametrize("form", ["head", "whole"])
@pytest.mark.parametrize(("tokens", "heads", "head_dim", "rotary_dim"), SHAPES)
def test_norms_come_before_the_rotation(
    device: torch.device,
    assert_close: Compare,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    rotary_dim: int,
    form: str,
) -> None:
    given = arguments(tokens, heads, head_dim, rotary_dim, torch.float32, device)
    widths = [head_dim] * 2 if form == "head" else [count * head_dim for count in heads]
    weights = [torch.randn(width, device=device) for width in widths]
    check(given, assert_close, *weights, eps=0.1)


def test_norms_are_rounded_before_the_rotation(device: torch.device) -> None:
    """As where the three are apart, which models were made with; bit for bit."""
    from tokenmill.kernels.rms_norm import rms_norm
    from tokenmill.kernels.rope_kv import rope_store_kv

    given = arguments(9, (4, 2), 64, 64, torch.bfloat16, device)
    weights = [torch.randn(64, device=device) for _ in range(2)]
    apart = [tensor.clone() for tensor in given]
    for index, weight in enumerate(weights):
        rows = apart[index].reshape(-1, 64)
        apart[index] = rms_norm(rows, weight, 1e-6).view(given[index].shape)
    q = rope_store_kv(*apart)
    together = [tensor.clone() for tensor in given]
    found = rope_store_kv(*together, q_norm=weights[0], k_norm=weights[1], eps=1e-6)
    differing = (found != q).sum() + (together[6] != apart[6]).sum() - apart[6].isnan().sum()
    assert differing <= 2  # sums of squares in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_of_8_bits_saturates(
    device: torch.device,
    assert_close: Compare,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    """Rounded to the nearest, ties to even; a number that is none stays so."""
    convert_as_processors_do(monkeypatch)
    given = arguments(7, (2, 2), 64, 32, dtype, device, torch.float8_e4m3fn)
    k, v = given[1:3]
    k[0, 0, -6:] = torch.tensor([460.0, 1e5, -470.0, math.inf, -math.inf, 1e-4])
    v[0, 0, :6] = torch.tensor([449.0, -1e30, math.inf, 17.0, 19.0, -0.001])
    v[2, 1, 5] = math.nan
    keys, values = check(given, assert_close)
    plain = [tensor.clone() for tensor in given]
    reference.rope_store_kv(*plain)
    assert torch.equal(values.view(torch.uint8), plain[7].view(torch.uint8))
    assert torch.equal(keys.view(torch.uint8)[..., 32:], plain[6].view(torch.uint8)[..., 32:])
    slot = divmod(int(given[5][0]), BLOCK_SIZE)
    assert keys[slot][0, -6:].float().tolist() == [448.0, 448.0, -448.0, 448.0, -448.0, 0.0]
    assert values[slot][0, :5].float().tolist() == [448.0, -448.0, 448.0, 16.0, 20.0]
    assert values[divmod(int(given[5][2]), BLOCK_SIZE)][1, 5].float().isnan()


def test_a_head_dim_that_differs_from_the_cache_is_named(device: torch.device) -> None:
    from tokenmill.kernels.rope_kv import rope_store_kv

    q, k, v, positions, cos_sin, slots, k_cache, v_cache = arguments(
        3, (2, 1), 32, 32, torch.float32, device
    )
    with pytest.raises(
        ValueError, match=r"^k_cache: expected shape \[.*1, 32\], got \[8, 16, 1, 16"
    ):
        rope_store_kv(q, k, v, positions, cos_sin, slots, k_cache[..., :16], v_cache[..., :16])


def test_norms_of_another_width_are_named(device: torch.device) -> None:
    from tokenmill.kernels.rope_kv import rope_store_kv

    given = arguments(3, (2, 1), 32, 32, torch.float32, device)
    wide = torch.ones(64, device=device)
    with pytest.raises(ValueError, match=r"^k_norm: expected shape \[32\], got \[64\]"):
        rope_store_kv(*given, q_norm=wide, k_norm=wide)
    with pytest.raises(ValueError, match=r"^q_norm, k_norm: expected both or none"):
        rope_store_kv(*given, k_norm=wide)
