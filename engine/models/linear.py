"""`Linear`: x @ weight.T + bias, with the weight laid out for its device.

On a CPU in float32 oneDNN multiplies a packed weight 1.3 to 4 times as fast as a plain one, most
for few rows and for the language-model head (docs/decisions/0005-cpu-linears.md). Elsewhere the
weight stays as it is, for cuBLAS.
"""

import torch
from torch.nn.functional import linear

#: Rows that the packed layout is chosen for; measured to be good from 1 to 256.
_ROWS = 16


class Linear:
    """Callable on rows [T, in]; returns [T, out]. `weight` is [out, in] until it is packed."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._is_packed = False

    def pack(self) -> None:
        """Replace the weight by its layout for the device; it can no longer be read or written."""
        weight = self.weight
        if (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        ):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(  # noqa: SLF001 (no public name)
                weight, _ROWS
            )
            self._is_packed = True

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._is_packed:
            return linear(rows, self.weight, self.bias)
        count = rows.shape[0]
        if count == 1:  # a row alone has a kernel of its own, which rounds differently
            rows = rows.expand(4, -1)  # no slower than one, and faster than two
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            rows, self.weight, self.bias, "none", [], ""
        )
        return packed[:count]
