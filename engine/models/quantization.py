"""How the weights of linears are held: as floats, or quantized, and by what.

| scheme | weights                         | rows                                                  |
| ------ | ------------------------------- | ----------------------------------------------------- |
| int8   | int8, one scale for each output | 8 bits in MLPs, 16 in attention and head, one scale   |
|        |                                 | for each row; what routes tokens to experts is float  |

int8 runs on a CPU in float32 (docs/decisions/0025-quantization.md: what the bits were chosen by).
"""

from collections.abc import Callable

import torch

from tokenmill.engine.models.int8_linear import Int8Weight, sums_exactly
from tokenmill.engine.models.shard import WHOLE, Shard
from tokenmill.producer.errors import InvalidRequest

#: A quantized weight: called on rows [T, in] it gives [T, out].
Quantized = Callable[[torch.Tensor], torch.Tensor]
#: A scheme: it makes one of a plain weight [out, in] and of the bits that rows must have at least.
Quantize = Callable[[torch.Tensor, int], Quantized]

QUANTIZATIONS = ("none", "int8")


def choose_quantization(
    name: str, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE
) -> Quantize | None:
    """The scheme of that name; None for `none`.

    Raises:
        InvalidRequest: not one of `QUANTIZATIONS`, or nothing that the device can do.
    """
    if name not in QUANTIZATIONS:
        raise InvalidRequest("quantization", f"one of {', '.join(QUANTIZATIONS)}", name)
    if name == "none":
        return None
    place = f"{name} on {device.type} in {dtype}".replace("torch.", "")
    if device.type != "cpu" or dtype != torch.float32:
        raise InvalidRequest(
            "quantization", "int8 on a CPU in float32 alone", place, "use --quantization none"
        )
    if shard.size > 1:
        raise InvalidRequest(
            "quantization",
            "none in a model that is divided among ranks",
            f"{name} on {shard.size} ranks",
            "leave out one of the two",
        )
    if not sums_exactly():
        raise InvalidRequest(
            "quantization",
            "int8 on a processor that adds products of int8 exactly (x86 with VNNI)",
            place,
            "use --quantization none",
        )
    return Int8Weight
