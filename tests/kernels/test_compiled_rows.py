"""The compiled row kernels give what the references give, and the same bits in any batch."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from tokenmill.kernels import compiled_rows, compiler, ops, reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]
COUNTS = [0, 1, 7, 8, 9, 100]


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", COUNTS)
def test_norms(count: int, assert_close: Compare, poisoned: None) -> None:
    x = torch.randn(count, 112)[:, :96]
    residual, weight = torch.randn(count, 96), torch.randn(96)
    assert_close(compiled_rows.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    for actual, wanted in zip(
        compiled_rows.add_rms_norm(x, residual, weight, 1e-5), expected, strict=True
    ):
        assert_close(actual, wanted)


@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
@pytest.mark.parametrize("count", COUNTS)
def test_gated_silu(count: int, scale: float, assert_close: Compare, poisoned: None) -> None:
    gate_up = torch.randn(count, 96) * scale
    actual = compiled_rows.gated_activation(gate_up)
    assert_close(actual, reference.gated_activation(gate_up, "silu"))


@pytest.mark.parametrize("count", [1, 9, 40])
@pytest.mark.parametrize("rotated", [2, 24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_and_write(
    dtype: torch.dtype, count: int, rotated: int, assert_close: Compare
) -> None:
    """Slots below zero are padding; channels behind the rotated ones stay."""
    heads = torch.randn(count, 8, 32)
    table, positions = torch.randn(50, rotated), torch.randint(50, (count,))
    slots = torch.randperm(48)[:count]
    slots[-1] = -1
    results = []
    for form in (reference.rope_store_kv, compiled_rows.rope_store_kv):
        own, caches = heads.clone(), torch.zeros(2, 6, 8, 2, 32, dtype=dtype)
        form(own[:, :4], own[:, 4:6], own[:, 6:], positions, table, slots, caches[0], caches[1])
        results.append((own, caches))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


def test_a_bfloat16_cache_is_rounded_to_the_nearest_even() -> None:
    """Every upper half, with lower halves below, at and above the middle; NaN and infinity too."""
    upper = torch.arange(1 << 16) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper + lower).to(torch.int32).view(torch.float32).view(-1, 1, 32)
        count, slots = len(values), torch.arange(len(values))
        caches = torch.zeros(2, count // 16, 16, 1, 32, dtype=torch.bfloat16)
        q, k = torch.zeros(2, count, 1, 32)
        table = torch.zeros(count, 2)
        compiled_rows.rope_store_kv(q, k, values, slots, table, slots, caches[0], caches[1])
        expected, actual = values.bfloat16().view(-1), caches[1].view(-1)
        assert torch.equal(actual.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(actual.view(torch.int16)[kept], expected.view(torch.int16)[kept])


@pytest.mark.parametrize(("position", "slot"), [(50, 0), (-1, 0), (1 << 40, 0), (0, 48)])
def test_rows_out_of_bounds_are_refused(position: int, slot: int) -> None:
    """Nothing is read behind the table or written behind the cache; the other rows are served."""
    heads, caches = torch.randn(20, 8, 32), torch.zeros(2, 6, 8, 2, 32)
    before, table = heads.clone(), torch.randn(50, 32)
    positions, slots = torch.arange(20), torch.arange(20)
    positions[13], slots[13] = position, slot
    q, k, v = heads[:, :4], heads[:, 4:6], heads[:, 6:]
    with pytest.raises(IndexError, match=r"0 to 49 and slots at most 47, got .* 1 of 20 rows"):
        compiled_rows.rope_store_kv(q, k, v, positions, table, slots, caches[0], caches[1])
    assert torch.equal(heads[13], before[13])
    assert torch.equal(caches[1].flatten(0, 1)[19], v[19])


def test_other_types_and_layouts_are_rotated_by_torch(assert_close: Compare) -> None:
    """What the compiled form would read wrongly."""
    heads, caches = torch.randn(9, 8, 32), torch.zeros(2, 6, 8, 2, 32)
    plain = {
        "positions": torch.arange(9),
        "cos_sin": torch.randn(50, 32),
        "slot_mapping": torch.arange(9),
        "k_cache": caches[0],
        "v_cache": caches[1],
    }
    wide = torch.zeros(6, 8, 2, 64)
    for odd in (
        {"positions": torch.arange(9, dtype=torch.int32)},
        {"positions": torch.arange(18)[::2]},
        {"slot_mapping": torch.arange(18)[::2]},
        {"cos_sin": torch.randn(50, 32, dtype=torch.float64)},
        {"cos_sin": torch.randn(50, 64)[:, ::2]},
        {"v_cache": torch.zeros(6, 8, 2, 32, dtype=torch.bfloat16)},
        {"k_cache": wide[..., :32]},
    ):
        results = []
        for form in (reference.rope_store_kv, ops.rope_store_kv):
            given: dict[str, Any] = deepcopy(plain | odd)  # strides too
            own = heads.clone()
            form(own[:, :4], own[:, 4:6], own[:, 6:], **given)
            results.append((own, given["k_cache"], given["v_cache"]))
        for expected, actual in zip(*results, strict=True):
            assert_close(actual, expected)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, weight, gate_up = torch.randn(100, 96), torch.randn(96), torch.randn(100, 192)
    normed, gated = compiled_rows.rms_norm(x, weight, 1e-5), compiled_rows.gated_activation(gate_up)
    for rows in (slice(0, 1), slice(7, 12), slice(99, 100)):
        assert torch.equal(compiled_rows.rms_norm(x[rows], weight, 1e-5), normed[rows])
        assert torch.equal(compiled_rows.gated_activation(gate_up[rows]), gated[rows])


def test_what_they_do_not_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd widths, other types, and everything on a machine without numba."""
    narrow, half = torch.randn(3, 20), torch.randn(3, 32, dtype=torch.bfloat16)
    for x in (narrow, half):
        weight = torch.ones(x.shape[1])
        expected = reference.rms_norm(x, weight, 1e-5)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), expected)
        assert torch.equal(ops.gated_activation(x, "silu"), reference.gated_activation(x, "silu"))
    monkeypatch.setattr(compiler, "is_available", lambda: False)
    monkeypatch.setattr(compiled_rows, "rms_norm", None)
    assert ops.rms_norm(torch.ones(2, 32), torch.ones(32), 1e-5).shape == (2, 32)
