"""The gated activation of Llama-shaped MLPs, in Triton.

    y = f(gate) * up,   gate_up = [gate | up],   with f one of
    silu(z) = z / (1 + exp(-z)),   gelu(z) = z * (1 + erf(z / sqrt(2))) / 2,   relu(z) = max(z, 0),
    gelu_tanh(z) = z * (1 + tanh(u)) / 2 = z / (1 + exp(-2u)),   u = sqrt(2 / pi) (z + 0.044715 z^3)

| tensor  | shape   | dtype                   | strides    |
| ------- | ------- | ----------------------- | ---------- |
| gate_up | [T, 2I] | float32, bfloat16, half | rows, 1    |
| y       | [T, I]  | that of gate_up         | contiguous |
"""

import torch
import triton
import triton.language as tl

from tokenmill.kernels.checks import check_divisible, check_floating, check_rows, check_shape

_BLOCK = 1024


@triton.jit
def _gated_activation_kernel(
    gate_up_ptr,
    y_ptr,
    gate_up_stride,
    y_stride,
    width,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_row = gate_up_ptr + row * gate_up_stride
    gate = tl.load(gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + width + columns, mask=inside, other=0.0).to(tl.float32)
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
    y = (active * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * y_stride + columns, y, mask=inside)


def gated_activation(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """Return `kind(gate) * up` [T, I] for `gate_up` [T, 2I].

    Raises:
        ValueError: an argument that does not fit the table above.
    """
    check_shape("gate_up", gate_up, "T", "2I")
    check_divisible("the width of gate_up", gate_up.shape[1], "gate and up", 2)
    check_floating("gate_up", gate_up)
    check_rows(gate_up=gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        grid = (num_rows, triton.cdiv(width, _BLOCK))
        _gated_activation_kernel[grid](
            gate_up,
            y,
            gate_up.stride(0),
            y.stride(0),
            width,
            KIND=kind,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,  # said outright, since Triton 3.10 changes the default
        )
    return y
