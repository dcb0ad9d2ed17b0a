"""Weights that a checkpoint stores in 4 or 8 bits, kept so: `kernels/dequant_gemm.py` runs them.

    w[n, k] = scales[n, g] * (q[n, k] - zeros[n, g])      g = k // group_size

While they are loaded, rows are outputs in all parts, as in a plain weight: a fused linear (qkv,
gate and up) is filled part by part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokenmill.kernels import ops
from tokenmill.kernels.packed_codes import BLOCK, pack_codes, words_per_block


@dataclass(frozen=True, slots=True)
class IntPacking:
    """`group_size`: inputs that share a scale and a zero point; 0: all of an output."""

    bits: int
    group_size: int

    @property
    def can_run(self) -> bool:
        """Whether the kernel takes groups of this size."""
        return self.group_size % words_per_block(self.bits) == 0

    def empty(self, out: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The parts of a linear [out, width], uninitialised, by what a checkpoint's are called."""
        words = (out, -(-width // BLOCK), words_per_block(self.bits))
        groups = -(-width // self.group_size) if self.group_size else 1
        return {
            "words": torch.empty(words, dtype=torch.int32, device=device),
            "scales": torch.empty(out, groups, device=device),
            "zeros": torch.empty(out, groups, dtype=torch.uint8, device=device),
        }

    def parts(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The same of codes [out, in], scales and zeros [out, groups]."""
        words = pack_codes(codes.to(torch.uint8), self.bits)
        return {"words": words, "scales": scales.float(), "zeros": zeros.to(torch.uint8)}

    def linear(self, parts: Mapping[str, torch.Tensor]) -> "PackedWeight":
        """What multiplies by the filled parts."""
        return PackedWeight(self, **parts)


class PackedWeight:
    """Made of filled parts, which it lays out for the kernel: outputs side by side.

    `has_fixed_tiles`: as that of a `Linear`.
    """

    def __init__(
        self,
        packing: IntPacking,
        words: torch.Tensor,  # [out, B, W]
        scales: torch.Tensor,  # [out, G]
        zeros: torch.Tensor,  # [out, G]
    ) -> None:
        self.has_fixed_tiles = False
        self._packing = packing
        self._words = words.transpose(0, 1).contiguous()
        self._scales = scales.t().contiguous()
        self._zeros = zeros.t().contiguous()

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self._words.nbytes + self._scales.nbytes + self._zeros.nbytes

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [T, in] to [T, out]."""
        return ops.dequant_linear(
            rows,
            self._words,
            self._scales,
            self._zeros,
            bias,
            bits=self._packing.bits,
            group_size=self._packing.group_size,
            fixed_tiles=self.has_fixed_tiles,
        )
