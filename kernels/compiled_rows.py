"""Norms, gated SiLU, rotation and KV write for the CPU, compiled: each reads its rows once.

Threads take `_ROWS` rows at a time. What is computed of a row depends on that row alone, and the
order of its sums on its width alone. All tensors are float32, but for a cache, which may be
bfloat16; widths are multiples of 16.
"""

import numpy as np
import torch
from numba import carray, types

from tokenmill.kernels.cache_vectors import narrow
from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import WIDTH, fetch_add, floats, gate_silu, int64s, sum_of_squares

#: Rows that a thread takes at a time.
_ROWS = 8


@compiled(types.void(types.int64))
def _norm_work(data):
    given = carray(int64s(data), (11,))
    num_rows, width, stride = given[3], given[4], given[5]
    x_at, residual_at, weight_at, y_at = given[6], given[7], given[8], given[9]
    eps = np.float32(given.view(np.float64)[10])
    weight = carray(floats(weight_at), (width,))
    first = fetch_add(data + 8, 1) * _ROWS
    while first < num_rows:
        for row in range(first, min(first + _ROWS, num_rows)):
            x = carray(floats(x_at + 4 * row * stride), (width,))
            y = carray(floats(y_at + 4 * row * width), (width,))
            if residual_at:
                total = carray(floats(residual_at + 4 * row * width), (width,))
                for column in range(width):
                    total[column] += x[column]
                x = total
                squares = sum_of_squares(residual_at + 4 * row * width, width // WIDTH)
            else:
                squares = sum_of_squares(x_at + 4 * row * stride, width // WIDTH)
            scale = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
            for column in range(width):
                y[column] = x[column] * scale * weight[column]
        first = fetch_add(data + 8, 1) * _ROWS


@compiled(types.void(types.int64))
def _gate_work(data):
    given = carray(int64s(data), (8,))
    num_rows, width, gate_up, y = given[3], given[4], given[5], given[6]
    first = fetch_add(data + 8, 1) * _ROWS
    while first < num_rows:
        for row in range(first, min(first + _ROWS, num_rows)):
            gate = gate_up + 8 * row * width
            gate_silu(gate, gate + 4 * width, y + 4 * row * width, width // WIDTH)
        first = fetch_add(data + 8, 1) * _ROWS


@compiled(types.void(types.int64))
def _pick_work(data):
    given = carray(int64s(data), (9,))
    num_rows, width, x, stride, y = given[3], given[4], given[5], given[6], given[7]
    places = carray(int64s(given[8]), (num_rows,))
    first = fetch_add(data + 8, 1) * _ROWS
    while first < num_rows:
        for row in range(first, min(first + _ROWS, num_rows)):
            source = carray(floats(x + 4 * places[row] * stride), (width,))
            target = carray(floats(y + 4 * row * width), (width,))
            for column in range(width):
                target[column] = source[column]
        first = fetch_add(data + 8, 1) * _ROWS


@compiled(types.void(types.int64))
def _rope_work(data):
    given = carray(int64s(data), (22,))
    num_rows, num_q_heads, num_kv_heads, dim, half = (
        given[3],
        given[4],
        given[5],
        given[6],
        given[7],
    )
    q_at, k_at, v_at, q_stride, k_stride, v_stride = (
        given[8], given[9], given[10], given[11], given[12], given[13],
    )  # fmt: skip
    positions, slots = (
        carray(int64s(given[14]), (num_rows,)),
        carray(int64s(given[15]), (num_rows,)),
    )
    table_at, k_cache_at, v_cache_at = given[16], given[17], given[18]
    num_positions, num_slots, size = given[19], given[20], given[21]
    width = num_kv_heads * dim
    first = fetch_add(data + 8, 1) * _ROWS
    while first < num_rows:
        for row in range(first, min(first + _ROWS, num_rows)):
            if not 0 <= positions[row] < num_positions or slots[row] >= num_slots:
                fetch_add(data, 1)
                continue
            table = table_at + 8 * positions[row] * half
            cos, sin = carray(floats(table), (half,)), carray(floats(table + 4 * half), (half,))
            for head in range(num_q_heads + num_kv_heads):
                if head < num_q_heads:
                    heads_at = q_at + 4 * (row * q_stride + head * dim)
                else:
                    heads_at = k_at + 4 * (row * k_stride + (head - num_q_heads) * dim)
                one, two = (
                    carray(floats(heads_at), (half,)),
                    carray(floats(heads_at + 4 * half), (half,)),
                )
                for channel in range(half):
                    a, b, c, s = one[channel], two[channel], cos[channel], sin[channel]
                    one[channel] = a * c - b * s
                    two[channel] = b * c + a * s
            if slots[row] >= 0:
                place = size * slots[row] * width
                if size == 2:
                    narrow(k_at + 4 * row * k_stride, k_cache_at + place, width // WIDTH)
                    narrow(v_at + 4 * row * v_stride, v_cache_at + place, width // WIDTH)
                    continue
                k = carray(floats(k_at + 4 * row * k_stride), (width,))
                v = carray(floats(v_at + 4 * row * v_stride), (width,))
                k_cache = carray(floats(k_cache_at + place), (width,))
                v_cache = carray(floats(v_cache_at + place), (width,))
                for channel in range(width):  # to assign a slice takes seconds to compile
                    k_cache[channel], v_cache[channel] = k[channel], v[channel]
        first = fetch_add(data + 8, 1) * _ROWS


def can_norm(x: torch.Tensor) -> bool:
    """Whether the norms take rows like these."""
    return x.dtype == torch.float32 and x.shape[-1] % WIDTH == 0 and x.stride(-1) == 1


def can_gate(gate_up: torch.Tensor, kind: str) -> bool:
    """Whether `gated_activation` takes these rows."""
    is_wide = gate_up.shape[-1] % (2 * WIDTH) == 0
    return kind == "silu" and is_wide and gate_up.dtype == torch.float32 and gate_up.is_contiguous()


def can_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> bool:
    """Whether `rope_store_kv` takes these."""
    return (  # no loops: it is asked in every layer
        q.dtype == k.dtype == v.dtype == cos_sin.dtype == torch.float32
        and k_cache.dtype == v_cache.dtype
        and (
            k_cache.dtype == torch.float32
            or (k_cache.dtype == torch.bfloat16 and k.shape[1] * k.shape[2] % WIDTH == 0)
        )
        and positions.dtype == slot_mapping.dtype == torch.int64
        and q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (q.shape[2], 1)
        and cos_sin.is_contiguous()
        and positions.is_contiguous()
        and slot_mapping.is_contiguous()
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference.rms_norm`."""
    return _normed(x, None, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.add_rms_norm`; `residual` becomes the sum."""
    return _normed(x, residual, weight, eps), residual


def _normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=torch.float32)
    run(norm_call(x, residual, weight, eps, y, len(x)), -(-len(x) // _ROWS))
    return y


def norm_call(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    num_rows: int | str,
) -> Call:
    """The first rows of y [R, H]: of `x` normed, or of what x is added to."""
    addresses = [
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
    ]
    return Call(_norm_work, [num_rows, x.shape[1], x.stride(0), *addresses, float(eps)])


def gated_activation(gate_up: torch.Tensor) -> torch.Tensor:
    """As `reference.gated_activation` of kind silu."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(num_rows, width, dtype=torch.float32)
    run(gate_call(gate_up, y, num_rows), -(-num_rows // _ROWS))
    return y


def gate_call(gate_up: torch.Tensor, y: torch.Tensor, num_rows: int | str) -> Call:
    """The first rows of y [R, I] = silu(gate) * up, of gate_up [R, 2I]."""
    return Call(_gate_work, [num_rows, y.shape[1], gate_up.data_ptr(), y.data_ptr()])


def pick_call(x: torch.Tensor, y: torch.Tensor, num_rows: int | str, places: int | str) -> Call:
    """The first rows of y [R, H]: the rows of x at `places`, an address of int64."""
    return Call(_pick_work, [num_rows, y.shape[1], x.data_ptr(), x.stride(0), y.data_ptr(), places])


def rope_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> None:
    """As `reference.rope_store_kv`.

    Raises:
        IndexError: a position that the table, or a slot that the cache lacks; such rows stay.
    """
    num_rows = q.shape[0]
    at = (num_rows, positions.data_ptr(), slot_mapping.data_ptr())
    num_wrong = run(rope_call(q, k, v, cos_sin, k_cache, v_cache, *at), -(-num_rows // _ROWS))
    if num_wrong:
        raise IndexError(wrong_rows(num_wrong, num_rows, cos_sin, k_cache))


def wrong_rows(num_wrong: int, num_rows: int, cos_sin: torch.Tensor, k_cache: torch.Tensor) -> str:
    """What to say of rows that `rope_call` has counted in its first counter."""
    return (
        f"positions must be 0 to {len(cos_sin) - 1} and slots at most "
        f"{k_cache.shape[0] * k_cache.shape[1] - 1}, got others in {num_wrong} of {num_rows} rows"
    )


def rope_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_rows: int | str,
    positions: int | str,
    slots: int | str,
) -> Call:
    """`rope_store_kv` of the first rows; `positions`, `slots`: addresses of int64."""
    return Call(
        _rope_work,
        [
            num_rows,
            q.shape[1],
            k.shape[1],
            q.shape[2],
            cos_sin.shape[1] // 2,
            *(t.data_ptr() for t in (q, k, v)),
            *(t.stride(0) for t in (q, k, v)),
            positions,
            slots,
            *(t.data_ptr() for t in (cos_sin, k_cache, v_cache)),
            len(cos_sin),
            k_cache.shape[0] * k_cache.shape[1],
            k_cache.element_size(),
        ],
    )
