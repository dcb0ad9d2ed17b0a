"""`Fp8Weight`: a weight of float8_e4m3fn, multiplied by rows that are quantized as they come.

    y[t, n] = x_scale[t] * w_scale[n] * sum_k x8[t, k] * w8[n, k]       summed in float32
    w8 = round(w / w_scale),  w_scale[n] = max_k |w[n, k]| / 448,   and the same for each row of x

A row has a scale of its own, so that it is quantized alike in any batch; whether the product sums
it alike is up to the library, which may choose another kernel for another number of rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

#: The format, and its largest value, beyond which a conversion may give NaN.
CODES = torch.float8_e4m3fn
_LARGEST = torch.finfo(CODES).max
#: Below this a row counts as zeros: it keeps its scale a normal number.
_LEAST = 1e-30
#: Both sides of a weight must be multiples of it.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Fp8Packing:
    """Weights that a checkpoint stores in fp8, with a scale for each output or for all, kept so."""

    @property
    def can_run(self) -> bool:
        """Always: it has no groups."""
        return True

    def empty(self, out: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The parts of a linear [out, width], uninitialised, by what a checkpoint's are called."""
        return {
            "codes": torch.empty(out, width, dtype=CODES, device=device),
            "scales": torch.empty(out, 1, device=device),
        }

    def linear(self, parts: Mapping[str, torch.Tensor]) -> "Fp8Weight":
        """What multiplies by the filled parts."""
        return Fp8Weight(parts["codes"], parts["scales"])


class Fp8Weight:
    """Codes [out, in] and scales [out, 1]; rows and results are bfloat16."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self._codes = codes.t()  # the product reads the weight by columns
        self._scales = scales.t().contiguous()

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self._codes.nbytes + self._scales.nbytes

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [T, in] to [T, out]."""
        if not len(rows):  # torch refuses the strides of their scales
            return rows.new_empty(0, self._codes.shape[1])
        codes, scales = quantize_rows(rows)
        product: torch.Tensor = torch._scaled_mm(  # noqa: SLF001 (no public name)
            codes, self._codes, scale_a=scales, scale_b=self._scales, out_dtype=rows.dtype
        )
        return product if bias is None else product.add_(bias)


def quantize_weight(weight: torch.Tensor, row_bits: int = 8) -> Fp8Weight | None:  # noqa: ARG001
    """An `Fp8Weight` of a plain weight [out, in]; None where its shape cannot be multiplied."""
    return Fp8Weight(*quantize_rows(weight)) if is_aligned(*weight.shape) else None


def is_aligned(out: int, width: int) -> bool:
    """Whether a weight of that shape can be multiplied."""
    return out % _ALIGNMENT == 0 and width % _ALIGNMENT == 0


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, in] and scales [T, 1] float32 of rows [T, in]."""
    scales = rows.abs().amax(dim=1, keepdim=True).float().clamp_(min=_LEAST) / _LARGEST
    return (rows.float() / scales).clamp_(-_LARGEST, _LARGEST).to(CODES), scales
