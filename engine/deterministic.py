"""`fix_tiles`: a GPU computes each row of a step alike in any batch, for `deterministic`.

| computed                        | fastest                         | deterministic             |
| ------------------------------- | ------------------------------- | ------------------------- |
| linears, the head, adapters     | cuBLAS                          | `kernels/fixed_linear.py` |
| experts, linears of 4 or 8 bits | tiles of 2 or 3 heights         | without the lowest        |
| attention                       | kernels for decoding and chunks | that for chunks, with     |
|                                 |                                 | tiles of one height       |
| norms, rotation, activations    | row by row                      | the same                  |

A CPU computes so anyway (docs/decisions/0014, 0036).
"""

from collections.abc import Iterable

from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.low_rank import Adapter
from tokenmill.engine.models.mlp import MoE
from tokenmill.producer.errors import InvalidRequest


def fix_tiles(model: LoadedModel, adapters: Iterable[Adapter], *, is_asked: bool) -> None:
    """Have model and adapters computed so on a GPU if it is asked for, or else the fastest way.

    Raises:
        InvalidRequest: it is asked for, and something of the model has no such form.
    """
    if model.device.type != "cuda":
        return
    if is_asked and (why := why_not_fixed(model)):
        raise InvalidRequest("deterministic", "left out on a GPU " + why, True)
    model.weights.fix_tiles(is_fixed=is_asked)
    for adapter in adapters:
        for pair in adapter.values():
            pair.fix_tiles(is_fixed=is_asked)


def why_not_fixed(model: LoadedModel) -> str:
    """What of a model has no such form on a GPU; "" if all of it has one."""
    if model.group.shard.size > 1:
        return "where a model is divided among ranks, whose sums are the library's"
    if not all(linear.can_fix_tiles for linear in model.weights.linears()):
        return "where linears are computed in fp8, by the library"
    mlps = [layer.mlp for layer in model.weights.layers]
    if any(isinstance(mlp, MoE) and mlp.stacks is None for mlp in mlps):
        return "where experts are computed one by one"
    return ""
