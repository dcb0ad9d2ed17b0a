"""`AdapterPlaces`: where the adapters of a step lie, for the calls of a `LayerProgram`."""

from collections.abc import Iterator

import torch

from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.low_rank import Adapted, Adapter
from tokenmill.engine.models.mlp import MLP
from tokenmill.engine.models.wanted_rows import WantedRows
from tokenmill.engine.models.weights import LayerWeights
from tokenmill.kernels.compiled_low_rank import NO_PLACE, STEP_NAMES, AdaptedRows, low_rank_call
from tokenmill.kernels.parallel import Call


class AdapterPlaces:
    """Of all adapters that have been met, by the numbers that linears have here."""

    def __init__(self, layers: list[LayerWeights]) -> None:
        self._numbers = {linear: number for number, linear in enumerate(_linears(layers))}
        #: Adapters, which stay here, and their places [L, 3], by id.
        self._met: dict[int, tuple[Adapter, torch.Tensor]] = {}

    def call(self, linear: Linear, x: torch.Tensor, y: torch.Tensor, which: str) -> Call:
        """What adapters add to y [R, out] from x [R, in]; `which`: before the names of numbers."""
        names = {name: which + name for name in STEP_NAMES}
        return low_rank_call(x, y, self._numbers[linear], names)

    def of_step(self, adapted: Adapted, wanted: WantedRows) -> tuple[AdaptedRows, AdaptedRows]:
        """For all rows of a step, and for those that are wanted, by their numbers among these."""
        pairs = torch.stack([self._places(adapter) for adapter, _ in adapted])
        of_all = AdaptedRows([rows for _, rows in adapted], pairs)
        if wanted.are_all:
            return of_all, of_all
        rows = [torch.isin(wanted.places, rows).nonzero().flatten() for _, rows in adapted]
        return of_all, AdaptedRows(rows, pairs)

    def _places(self, adapter: Adapter) -> torch.Tensor:
        if id(adapter) not in self._met:
            places = [NO_PLACE] * len(self._numbers)
            for linear, pair in adapter.items():
                if pair.panels is None:
                    raise TypeError("adapters that are not packed to panels have no program")
                places[self._numbers[linear]] = pair.panels.place
            self._met[id(adapter)] = adapter, torch.tensor(places)
        return self._met[id(adapter)][1]


def _linears(layers: list[LayerWeights]) -> Iterator[Linear]:
    for layer in layers:
        if isinstance(layer.mlp, MLP):
            yield from (layer.qkv, layer.attention_out, layer.mlp.up, layer.mlp.down)
