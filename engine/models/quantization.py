"""How the weights of linears are held: as floats, or quantized, and by what.

| scheme | weights                          | rows                                | on        |
| ------ | -------------------------------- | ----------------------------------- | --------- |
| int8   | int8, a scale for each output    | 8 bits, a scale for each 64 values, | CPU, in   |
|        |                                  | or what `int8_linear.py` says       | float32   |
| fp8    | e4m3, a scale for each output;   | e4m3, a scale for each row          | GPU, in   |
|        | the head stays float             |                                     | bfloat16  |
| packed | 4 or 8 bits as a checkpoint has  | float                               | GPU       |
|        | them, scale and zero for a group |                                     |           |

What routes tokens to experts is float in all. `packed` has no name to choose it by: it is how a
GPU holds a checkpoint that is stored so (docs/decisions/0025-quantization.md: what the bits of int8
were chosen by; 0030-packed-weights.md: the GPU).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenmill.engine.models.fp8_linear import Fp8Packing, quantize_weight
from tokenmill.engine.models.int8_linear import int8_weight, sums_exactly
from tokenmill.engine.models.shard import WHOLE, Shard
from tokenmill.producer.errors import InvalidRequest

QUANTIZATIONS = ("none", "int8", "fp8")
#: The least compute capability that converts to fp8, and whose tensor cores multiply it.
FP8_CAPABILITY = (8, 9)


class Quantized(Protocol):
    """A quantized weight: of rows [T, in] it makes [T, out]."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product, plus `bias` [out]."""


class Packing(Protocol):
    """A form in which a checkpoint's quantized weights are kept; rows are outputs in its parts."""

    @property
    def can_run(self) -> bool:
        """Whether there is a kernel for it."""

    def empty(self, out: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The parts of a linear [out, width], by name, uninitialised."""

    def linear(self, parts: Mapping[str, torch.Tensor]) -> Quantized:
        """The weight that filled parts make."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One that quantizes weights which were loaded as floats."""

    name: str
    #: Of a plain weight [out, in] and of the bits that rows must have at least; None: it stays.
    quantize: Callable[[torch.Tensor, int], Quantized | None]
    #: Whether the language-model head is quantized too.
    has_head: bool


INT8 = Scheme("int8", int8_weight, has_head=True)
FP8 = Scheme("fp8", quantize_weight, has_head=False)


def choose_quantization(
    name: str, device: torch.device, dtype: torch.dtype, shard: Shard = WHOLE
) -> Scheme | None:
    """The scheme of that name; None for `none`.

    Raises:
        InvalidRequest: not one of `QUANTIZATIONS`, or nothing that the device can do.
    """
    if name not in QUANTIZATIONS:
        raise InvalidRequest("quantization", f"one of {', '.join(QUANTIZATIONS)}", name)
    if name == "none":
        return None
    expected, got = (_int8_lacks if name == "int8" else _fp8_lacks)(device, dtype)
    if expected:
        raise InvalidRequest("quantization", expected, got, "use --quantization none")
    if shard.size > 1:
        raise InvalidRequest(
            "quantization",
            "none in a model that is divided among ranks",
            f"{name} on {shard.size} ranks",
            "leave out one of the two",
        )
    return INT8 if name == "int8" else FP8


def why_not_kept(
    packing: Packing, device: torch.device, dtype: torch.dtype, shard: Shard, scheme: Scheme | None
) -> str:
    """Why a checkpoint's packed weights become floats here; "" where they stay as they are."""
    is_fp8 = isinstance(packing, Fp8Packing)
    if scheme is not None and not (is_fp8 and scheme is FP8):
        return f"they are quantized again as {scheme.name}"
    if not runs_packed(device):
        return "there is no kernel for them on this device"
    if is_fp8 and _fp8_lacks(device, dtype)[0]:
        expected, got = _fp8_lacks(device, dtype)
        return f"they need {expected}, got {got}"
    if shard.size > 1:
        return "the model is divided among ranks"
    return "" if packing.can_run else "there is no kernel for groups of their size"


def runs_packed(device: torch.device) -> bool:
    """Whether the kernels of packed weights run there."""
    return device.type == "cuda"


def fp8_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) of what is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _int8_lacks(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What int8 needs and does not get; both empty if nothing."""
    place = f"int8 on {device.type} in {dtype}".replace("torch.", "")
    if device.type != "cpu" or dtype != torch.float32:
        return "int8 on a CPU in float32 alone", place
    if not sums_exactly():
        return "int8 on a processor that adds products of int8 exactly (x86 with VNNI)", place
    return "", ""


def _fp8_lacks(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What fp8 needs and does not get; both empty if nothing."""
    capability = fp8_capability(device)
    if capability >= FP8_CAPABILITY and dtype == torch.bfloat16:
        return "", ""
    what = "{}.{}".format(*capability) if device.type == "cuda" else "none"
    place = f"fp8 on {device.type} (compute capability {what}) in {dtype}".replace("torch.", "")
    return "fp8 on a GPU of compute capability 8.9 or more in bfloat16", place
