"""Weights of int8, multiplied by rows that are quantized as they come.

`GroupedInt8Weight`, compiled: each 64 values of a row have a scale, and 8 bits.

    y[t, n] = w_scale[n] * sum_g x_scale[t, g] * sum_k xq[t, g, k] * w8[n, g, k]
    w8 = round(w / w_scale),  w_scale[n] = max_k |w[n, k]| / 127,   and the same for each group of x

`Int8Weight`, of oneDNN, for shapes and processors that the first does not take: a row has one
scale. Rows of 8 bits are one product. Rows of 16 bits are two: xq = 256 * high + low, of which both
are int8, stand one above the other in one call; it costs twice as much and loses nothing to speak
of. oneDNN multiplies unsigned by signed integers fast, so rows are kept 128 too large and it takes
that off again.

Sums of integers are exact in any order, those of groups are in order, and each row has scales of
its own: the product has the same bits whatever else is in the batch (docs/decisions/0014).
"""

from functools import cache
from typing import TYPE_CHECKING

import torch

from tokenmill.kernels import cpu_ops

if TYPE_CHECKING:
    from tokenmill.kernels.parallel import Call

#: The largest quantized value, and what makes it unsigned.
_LEVELS, _OFFSET = 127, 128
#: The same of 16 bits, whose two halves are 8 bits of their own.
_WIDE_LEVELS, _WIDE_OFFSET = 256 * _LEVELS, 257 * _OFFSET
#: Below this a row counts as zeros: it keeps levels / largest finite.
_LEAST = 1e-30


class GroupedInt8Weight:
    """Made of a plain weight [out, in] that `cpu_ops.can_pack_int8` takes; it does not keep it."""

    def __init__(self, weight: torch.Tensor) -> None:
        codes, self._scales = quantize_rows(weight)
        self._packed = cpu_ops.pack_int8(codes)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self._packed.nbytes + self._scales.nbytes

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [T, in] float32 to [T, out] float32, plus `bias`."""
        return cpu_ops.packed_int8_linear(rows, self._packed, self._scales, bias)

    def calls(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        codes: torch.Tensor,
        num_rows: str,
    ) -> "list[Call]":
        """As `Linear.calls`."""
        from tokenmill.kernels import compiled_int8

        weight = (self._packed, self._scales, bias)
        return list(compiled_int8.linear_calls(x, *weight, y, codes, num_rows))


class Int8Weight:
    """Made of a plain weight [out, in], float32 on a CPU, which it does not keep."""

    def __init__(self, weight: torch.Tensor, row_bits: int = 8) -> None:
        codes, self._scales = quantize_rows(weight)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._zeros = torch.zeros(len(codes), dtype=torch.long)
        self._is_wide = row_bits > 8
        self._nbytes = codes.nbytes + self._scales.nbytes + self._zeros.nbytes

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self._nbytes

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [T, in] float32 to [T, out] float32, plus `bias`."""
        product = self._scaled(rows)
        return product if bias is None else product.add_(bias)

    def _scaled(self, rows: torch.Tensor) -> torch.Tensor:
        largest = rows.abs().amax(dim=1, keepdim=True).clamp_(min=_LEAST)  # [T, 1]
        # The halves that are added round to the nearest, as the conversion cuts off.
        if not self._is_wide:
            codes = (rows * (_LEVELS / largest)).add_(_OFFSET + 0.5).to(torch.uint8)
            return self._product(codes).mul_(largest / _LEVELS)
        wide = (rows * (_WIDE_LEVELS / largest)).add_(_WIDE_OFFSET + 0.5).to(torch.int32)
        low, high = self._product(_bytes(wide)).chunk(2)
        return low.add_(high, alpha=256).mul_(largest / _WIDE_LEVELS)

    def _product(self, codes: torch.Tensor) -> torch.Tensor:
        return _product(codes, self._packed, self._scales, self._zeros)


def int8_weight(weight: torch.Tensor, row_bits: int) -> GroupedInt8Weight | Int8Weight:
    """The faster of the two that a weight can be; groups of 8 bits do for rows of 16."""
    if cpu_ops.can_pack_int8(weight):
        return GroupedInt8Weight(weight)
    return Int8Weight(weight, row_bits)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [out, in] and scales [out] of a float weight [out, in]."""
    scales = weight.abs().amax(dim=1).clamp_(min=_LEAST) / _LEVELS
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def _bytes(wide: torch.Tensor) -> torch.Tensor:
    """The lower two bytes of int32 [T, in]: all the low ones, then all the high ones, [2T, in]."""
    low_high = wide.view(torch.uint8).view(*wide.shape, 4)[..., :2]
    return low_high.permute(2, 0, 1).flatten(0, 1)


def _product(
    codes: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, _OFFSET, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@cache
def sums_exactly() -> bool:
    """Whether this machine multiplies integers so, without saturating sums of two products.

    Processors without VNNI add pairs of products in 16 bits.
    """
    width, out = 64, 32
    codes = torch.full((out, width), 127, dtype=torch.int8)
    codes[1::2] = -127
    rows = torch.full((4, width), 255, dtype=torch.uint8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        zeros = torch.zeros(out, dtype=torch.long)
        got = _product(rows, packed, torch.ones(out), zeros)
    except (AttributeError, RuntimeError):  # a build of torch without it
        return False
    return torch.equal(got, (rows.float() - _OFFSET) @ codes.float().T)
