"""The references against independent statements of the same mathematics: torch and transformers."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tokenmill.kernels import reference

BuildCase = Callable[..., Any]


def test_rms_norm_matches_torch() -> None:
    x, weight = torch.randn(7, 100), torch.randn(100)
    expected = torch.nn.functional.rms_norm(x, (100,), weight, 1e-5)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), expected)


def test_add_rms_norm_norms_the_rounded_sum() -> None:
    x, residual = torch.randn(2, 7, 100).bfloat16()
    weight = torch.ones(100).bfloat16()
    y, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, reference.rms_norm(x + residual, weight, 1e-5))


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("silu", lambda z: z / (1 + math.exp(-z))),
        ("gelu", lambda z: z * (1 + math.erf(z / 2**0.5)) / 2),
        (
            "gelu_tanh",
            lambda z: z * (1 + math.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
        ),
        ("relu", lambda z: max(z, 0.0)),
    ],
)
def test_gated_activation_gates_with_the_first_half(
    kind: str, formula: Callable[[float], float]
) -> None:
    gate, up = 3 * torch.randn(2, 7, 10)
    expected = torch.tensor([[formula(z) for z in row] for row in gate.tolist()]) * up
    actual = reference.gated_activation(torch.cat([gate, up], dim=1), kind)
    torch.testing.assert_close(actual, expected)


def test_layer_norm_has_mean_and_variance_of_its_weights() -> None:
    x = torch.randn(7, 100).bfloat16()
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * 2 + 3
    actual = reference.layer_norm(x, torch.full((100,), 2.0), torch.full((100,), 3.0), 1e-5)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_rope_turns_each_channel_pair_as_a_complex_number(rotary_dim: int) -> None:
    """A pair (a, b) is a + bi times exp(i * angle); the channels behind the rotary ones rest."""
    q, k, v = torch.randn(5, 3, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    before = q.clone()
    positions = torch.tensor([0, 3, 1, 9, 9])
    half = rotary_dim // 2
    angles = torch.outer(torch.arange(10.0), torch.rand(half))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    caches = torch.zeros(2, 1, 8, 1, 8)
    reference.rope_store_kv(q, k, v, positions, cos_sin, torch.arange(5), *caches)
    turn = torch.polar(torch.ones(5, half), angles[positions]).unsqueeze(1)
    turned = torch.complex(before[..., :half], before[..., half:rotary_dim]) * turn
    torch.testing.assert_close(q[..., :rotary_dim], torch.cat([turned.real, turned.imag], dim=-1))
    assert torch.equal(q[..., rotary_dim:], before[..., rotary_dim:])


def test_keys_and_values_go_to_their_slots_and_padding_nowhere() -> None:
    q, k, v = torch.randn(3, 2, 4), torch.randn(3, 1, 4), torch.randn(3, 1, 4)
    k_cache, v_cache = torch.full((2, 3, 2, 1, 4), math.nan)
    slots = torch.tensor([5, -1, 2])
    cos_sin = torch.tensor([[0.6, 1.0, 0.8, 0.0]])  # one position: channels 0 and 2 turn
    reference.rope_store_kv(q, k, v, torch.zeros(3).long(), cos_sin, slots, k_cache, v_cache)
    assert torch.equal(k_cache[2, 1], k[0])
    assert torch.equal(v_cache[2, 1], v[0])
    assert torch.equal(k_cache[1, 0], k[2])
    assert k_cache.isnan().sum() == v_cache.isnan().sum() == 4 * 4


def test_paged_attention_matches_dense_attention(attention_case: BuildCase) -> None:
    """Two sequences laid out densely by hand, chunk by chunk, against torch's own attention."""
    case = attention_case([(3, 20), (1, 7)], heads=(6, 2))
    out = case.run(reference.paged_attention)
    for row, (start, length, context) in enumerate([(0, 3, 20), (3, 1, 7)]):
        blocks = case.block_tables[row].long()
        keys = case.k_cache[blocks].flatten(0, 1)[:context].transpose(0, 1)
        values = case.v_cache[blocks].flatten(0, 1)[:context].transpose(0, 1)
        mask = torch.ones(length, context, dtype=torch.bool).tril(context - length)
        expected = torch.nn.functional.scaled_dot_product_attention(
            case.q[start : start + length].transpose(0, 1)[None],
            keys.repeat_interleave(3, dim=0)[None],
            values.repeat_interleave(3, dim=0)[None],
            attn_mask=mask,
        )
        torch.testing.assert_close(out[start : start + length], expected[0].transpose(0, 1))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 5, 100])
def test_a_window_and_a_soft_cap_by_hand(
    attention_case: BuildCase, window: int, softcap: float | None
) -> None:
    """One head, element by element."""
    case = replace(attention_case([(3, 20)], heads=(1, 1)), window=window, softcap=softcap)
    out = case.run(reference.paged_attention)
    blocks = case.block_tables[0].long()
    keys, values = (c[blocks].flatten(0, 1)[:20, 0] for c in (case.k_cache, case.v_cache))
    for i in range(3):
        seen = range(max(0, 17 + i - window + 1), 17 + i + 1)
        scores = [float(case.q[i, 0] @ keys[n]) * case.scale for n in seen]
        if softcap:
            scores = [softcap * math.tanh(s / softcap) for s in scores]
        total = sum(map(math.exp, scores))
        expected = sum(values[n] * math.exp(s) / total for n, s in zip(seen, scores, strict=True))
        torch.testing.assert_close(out[i, 0], expected)


def test_a_chunk_equals_its_tokens_one_by_one(attention_case: BuildCase) -> None:
    whole = attention_case([(5, 12)])
    out = whole.run(reference.paged_attention)
    for i in range(5):
        single = reference.paged_attention(
            whole.q[i : i + 1],
            whole.k_cache,
            whole.v_cache,
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=torch.tensor([8 + i], dtype=torch.int32),
            block_tables=whole.block_tables,
            max_query_len=1,
            scale=whole.scale,
        )
        torch.testing.assert_close(out[i : i + 1], single)
