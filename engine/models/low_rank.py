"""`LowRank`: what an adapter adds to the outputs of a linear, for the rows that ask for it.

With AVX-512 both products and the addition are one compiled call; the scale is in `up`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tokenmill.engine.models.linear import Linear
from tokenmill.kernels import cpu_ops

if TYPE_CHECKING:
    from tokenmill.kernels.compiled_low_rank import Panels


class LowRank:
    """up(down(rows)), of down [ranks, in] and up [out, ranks]."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        #: Where there is a compiled kernel for them.
        self.panels: Panels | None = (
            cpu_ops.pack_low_rank(down, up) if cpu_ops.can_pack(up) else None
        )
        self._linears: tuple[Linear, ...] = ()
        if self.panels is None:
            self._linears = Linear(down.clone()), Linear(up.clone())  # packing takes their memory
            for linear in self._linears:
                linear.pack()

    @property
    def nbytes(self) -> int:
        """Memory of both."""
        if self.panels is not None:
            return self.panels.down.nbytes + self.panels.up.nbytes
        return sum(linear.nbytes for linear in self._linears)

    def fix_tiles(self, *, is_fixed: bool) -> None:
        """As of a `Linear`, for both."""
        for linear in self._linears:
            linear.fix_tiles(is_fixed=is_fixed)

    def add(self, out: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> None:
        """Add to out [T, out] at `places` what it makes of rows [T, in] there."""
        if self.panels is not None:
            cpu_ops.add_low_rank(out, rows, places, self.panels)
            return
        down, up = self._linears
        out.index_add_(0, places, up(down(rows[places])))


#: What an adapter adds, by linear.
Adapter = Mapping[Linear, LowRank]
#: The adapters of a step, each with the numbers of its rows, int64; no row is in two.
Adapted = Sequence[tuple[Adapter, torch.Tensor]]
