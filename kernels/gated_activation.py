"""The gated activation of Llama-shaped MLPs, and the plain one of older models, in Triton.

    y = f(gate) * up,   gate_up = [gate | up],   or y = f(x),   with f one of
    silu(z) = z / (1 + exp(-z)),   gelu(z) = z * (1 + erf(z / sqrt(2))) / 2,   relu(z) = max(z, 0),
    gelu_tanh(z) = z * (1 + tanh(u)) / 2 = z / (1 + exp(-2u)),   u = sqrt(2 / pi) (z + 0.044715 z^3)

| tensor  | shape   | dtype                   | strides    |
| ------- | ------- | ----------------------- | ---------- |
| gate_up | [T, 2I] | float32, bfloat16, half | rows, 1    |
| x       | [T, I]  | the same                | rows, 1    |
| y       | [T, I]  | that of gate_up or x    | contiguous |
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_divisible, check_floating, check_rows, check_shape

_BLOCK = 1024


@triton.jit
def _activation_kernel(
    x_ptr,
    y_ptr,
    x_stride,
    y_stride,
    width,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    x_row = x_ptr + row * x_stride
    gate = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_row + width + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == "silu":
        active = gate * tl.sigmoid(gate)
    elif KIND == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(tl.maximum(doubled, -80.0))  # the cube would overflow exp
    else:
        tl.static_assert(KIND == "relu")
        active = tl.maximum(gate, 0.0)
    if GATED:
        active = active * up
    tl.store(y_ptr + row * y_stride + columns, active.to(y_ptr.dtype.element_ty), mask=inside)


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """Return `kind(gate) * up` [T, I] for `gate_up` [T, 2I].

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("gate_up", gate_up, "T", "2I")
    check_divisible("the width of gate_up", gate_up.shape[1], "gate and up", 2)
    check_floating("gate_up", gate_up)
    check_rows(gate_up=gate_up)
    return _launch(gate_up, gate_up.shape[1] // 2, kind, gated=True)


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Return `kind(x)` for `x` [T, I].

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("x", x, "T", "I")
    check_floating("x", x)
    check_rows(x=x)
    return _launch(x, x.shape[1], kind, gated=False)


def _launch(x: torch.Tensor, width: int, kind: str, *, gated: bool) -> torch.Tensor:
    y = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    if y.numel():
        _activation_kernel[(len(y), triton.cdiv(width, _BLOCK))](
            x,
            y,
            x.stride(0),
            y.stride(0),
            width,
            KIND=kind,
            GATED=gated,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )
    return y
