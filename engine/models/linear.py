"""`Linear`: x @ weight.T + bias, with the weight laid out for its device.

On a CPU in float32 a packed weight is multiplied 1.3 to 4 times as fast as a plain one, most for
few rows and for the language-model head: with AVX-512 by a kernel of ours, otherwise by oneDNN
(docs/decisions/0005-cpu-linears.md). Elsewhere the weight stays as it is, for cuBLAS. A quantized
linear is as its scheme says (`quantization.py`).

With `fix_tiles` a row has the same bits in any batch on a GPU too (decision 36).

An adapter adds to the rows of the sequences that ask for it: `low_rank.py`.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from tokenmill.engine.models.fp8_linear import Fp8Weight
from tokenmill.engine.models.int8_linear import GroupedInt8Weight
from tokenmill.engine.models.packed_linear import PackedWeight
from tokenmill.engine.models.quantization import Packing, Quantized, Scheme
from tokenmill.kernels import cpu_ops, ops

if TYPE_CHECKING:
    from tokenmill.engine.models.low_rank import Adapted
    from tokenmill.kernels.parallel import Call

#: Rows that the packed layout is chosen for; measured to be good from 1 to 256.
_ROWS = 16


class Linear:
    """Callable on rows [T, in]; returns [T, out]. `weight` is [out, in] until it is packed.

    `row_bits`: what a scheme that quantizes its rows must leave them at least; 32: keep it plain.
    `packing`, `parts`: how the weight is kept as its checkpoint stores it, and in what; then
    `weight` has a shape and no memory.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        row_bits: int = 8,
        packing: Packing | None = None,
        parts: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.row_bits = row_bits
        self._is_packed = False
        self._is_panels = False
        self._has_fixed_tiles = False
        self._quantized: Quantized | None = None
        self._packing = packing
        self._parts = parts or {}
        self._plain_bytes = weight.nbytes

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is held as integers or 8-bit floats."""
        return self._quantized is not None

    @property
    def nbytes(self) -> int:
        """Memory of the weight and the bias."""
        weight = self._quantized.nbytes if self._quantized else self._plain_bytes
        return weight + (0 if self.bias is None else self.bias.nbytes)

    def parts(self) -> dict[str, torch.Tensor]:
        """What a checkpoint fills, by name; the rows of each are outputs."""
        parts = self._parts or {"weight": self.weight}
        return parts if self.bias is None else parts | {"bias": self.bias}

    def pack(self, scheme: Scheme | None = None) -> None:
        """Replace the weight by its layout for the device; it can no longer be read or written.

        It may be laid out in its own memory, so whoever gave it must not use it any more.

        `scheme`: what the linear is quantized by.
        """
        weight = self.weight
        if self._packing is not None:
            self._quantized = self._packing.linear(self._parts)
            self._parts = {}
            return
        if scheme is not None and self.row_bits < 32:
            self._quantized = scheme.quantize(weight, self.row_bits)
        if self._quantized is not None:
            self.weight = weight.new_empty(0)
        elif cpu_ops.can_pack(weight):
            self.weight = cpu_ops.pack(weight)
            self._is_panels = True
        elif (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        ):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001 (no public name)
                weight, _ROWS
            )
            self._is_packed = True

    @property
    def can_fix_tiles(self) -> bool:
        """Whether a GPU has a form of it whose rows have the same bits in any batch."""
        return not isinstance(self._quantized, Fp8Weight)

    def fix_tiles(self, *, is_fixed: bool = True) -> None:
        """Compute by that form from here on, or by the fastest again; on a GPU, once packed."""
        self._has_fixed_tiles = is_fixed
        if isinstance(self._quantized, PackedWeight):
            self._quantized.has_fixed_tiles = is_fixed

    @property
    def layout(self) -> str:
        """How the weight is held, by name: linears of one shape and layout take the same time."""
        if self._quantized is not None:
            return f"{type(self._quantized).__name__}, rows that need {self.row_bits} bits"
        return "panels" if self._is_panels else "packed" if self._is_packed else "plain"

    @property
    def has_calls(self) -> bool:
        """Whether `calls` can be asked for."""
        return self._is_panels or isinstance(self._quantized, GroupedInt8Weight)

    def calls(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        codes: torch.Tensor,
        num_rows: str,
    ) -> "list[Call]":
        """Compiled calls that compute the first rows of y [R, out] from those of x [R, in].

        `codes`: memory that int8 needs; `num_rows`: name of how many rows there are.
        """
        if isinstance(self._quantized, GroupedInt8Weight):
            return self._quantized.calls(x, self.bias, y, codes, num_rows)
        from tokenmill.kernels import compiled_linear

        return [compiled_linear.linear_call(x, self.weight, self.bias, y, num_rows)]

    def __call__(self, rows: torch.Tensor, adapted: "Adapted" = ()) -> torch.Tensor:
        out = self._product(rows)
        for adapter, places in adapted:
            if pair := adapter.get(self):
                pair.add(out, rows, places)
        return out

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._quantized is not None:
            return self._quantized(rows, self.bias)
        if self._is_panels:
            return cpu_ops.packed_linear(rows, self.weight, self.bias)
        if self._has_fixed_tiles:
            return ops.fixed_linear(rows, self.weight, self.bias)
        if not self._is_packed:
            return linear(rows, self.weight, self.bias)
        count = rows.shape[0]
        if count == 1:  # a row alone has a kernel of its own, which rounds differently
            rows = rows.expand(4, -1)  # no slower than one, and faster than two
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            rows, self.weight, self.bias, "none", [], ""
        )
        return packed[:count]
