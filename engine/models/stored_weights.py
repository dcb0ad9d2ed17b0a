"""Checkpoints whose linears are stored quantized, read as the floats that they stand for or kept.

| format             | of a linear [out, in] are stored                                            |
| ------------------ | --------------------------------------------------------------------------- |
| awq (gemm)         | qweight int32 [in, out / 8], qzeros int32 [in / G, out / 8], scales         |
|                    | [in / G, out]; 4 bits, eight along `out` in the order 0 2 4 6 1 3 5 7       |
| gptq               | qweight int32 [in / n, out], qzeros int32 [in / G, out / n], scales         |
|                    | [in / G, out], g_idx [in]; n = 32 / bits in order; 4 or 8 bits; a stored    |
|                    | zero point is one too small (not so in gptq_v2)                             |
| compressed-tensors | weight int8 or float8_e4m3fn [out, in], weight_scale [out, 1] or [1]        |

    w[o, i] = scale[g, o] * (q[o, i] - zero[g, o])        g the group of input i

What stays packed is laid out anew, in the parts that its `packing` names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.checkpoint import NamedTensors
from tokenmill.engine.models.fp8_linear import Fp8Packing
from tokenmill.engine.models.packed_linear import IntPacking
from tokenmill.engine.models.quantization import Packing

#: Where AWQ puts each eighth of a word: nibble n is of this column.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLAIN = "choose the unquantized model"

#: The stored parts of one linear, by name.
Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A format: the parts of a linear that make its weight, those of no use, and how it is made."""

    name: str
    parts: frozenset[str]
    weight: Callable[[Parts], torch.Tensor]
    unused: frozenset[str] = frozenset()
    #: How a device that can keeps the weights, and what it keeps of them; None: as floats alone.
    packing: Packing | None = None
    packed: Callable[[Parts], Parts] | None = None

    def floats(self, tensors: NamedTensors) -> NamedTensors:
        """The tensors of a checkpoint with a float32 weight in place of the parts of each linear.

        Raises:
            UnsupportedModel: a linear lacks a part, or its parts do not fit each other.
        """
        return self._linears(tensors, lambda parts: {"weight": self.weight(parts)})

    def kept(self, tensors: NamedTensors, device: torch.device) -> NamedTensors:
        """The same with the parts of `packing`, laid out anew on the device.

        Raises:
            UnsupportedModel: a linear lacks a part, or its parts do not fit each other.
        """
        packed = self.packed or dict
        return self._linears(
            tensors, lambda parts: packed({name: part.to(device) for name, part in parts.items()})
        )

    def is_part(self, kind: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor is of a quantized linear; `kind` is the last step of its name."""
        return kind in self.parts and (kind != "weight" or _is_quantized(tensor))

    def _linears(self, tensors: NamedTensors, made: Callable[[Parts], Parts]) -> NamedTensors:
        held: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            path, _, kind = name.rpartition(".")
            if kind in self.unused:
                continue
            if not self.is_part(kind, tensor):
                yield name, tensor
                continue
            parts = held.setdefault(path, {})
            parts[kind] = tensor
            if parts.keys() == self.parts:
                for own, values in _made(path, held.pop(path), made).items():
                    yield f"{path}.{own}", values
        if held:
            path, parts = next(iter(held.items()))
            missing = ", ".join(sorted(self.parts - parts.keys()))
            raise UnsupportedModel(f"{path} lacks {missing}; pull the model again")


def _made(path: str, parts: Parts, made: Callable[[Parts], Parts]) -> Parts:
    try:
        return made(parts)
    except (RuntimeError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
        raise UnsupportedModel(
            f"the parts of {path} do not fit each other: {shapes}; pull the model again"
        ) from error


def stored_weights(config: Mapping[str, Any]) -> StoredWeights | None:
    """The format that a model's config names; None: it is stored as floats.

    Raises:
        UnsupportedModel: a format, or a form of one, that cannot be read.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    try:
        return _read(stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(
            f"the model's quantization_config has a wrong value: {error}; pull it again"
        ) from error


def _read(stored: Mapping[str, Any]) -> StoredWeights:
    method = str(stored.get("quant_method", "?"))
    if method not in _READERS:
        raise UnsupportedModel(
            f"quant_method must be one of {', '.join(_READERS)}, got {method!r}; {_PLAIN}"
        )
    return _READERS[method](stored)


def _awq(stored: Mapping[str, Any]) -> StoredWeights:
    version = str(stored.get("version", "gemm")).lower()
    _require("awq", "version", version, ("gemm",))
    _require("awq", "bits", stored.get("bits", 4), (4,))

    def codes(parts: Parts) -> _Codes:
        codes = _columns(parts["qweight"], 4, _AWQ_ORDER)
        zeros = _columns(parts["qzeros"], 4, _AWQ_ORDER)
        return _Codes(codes, zeros, parts["scales"], _group_size(stored))

    names = frozenset({"qweight", "qzeros", "scales"})
    return _grouped("awq, 4 bits", names, codes, _packing(4, stored))


def _gptq(stored: Mapping[str, Any]) -> StoredWeights:
    _require("gptq", "bits", stored.get("bits"), (4, 8))
    bits = int(stored["bits"])
    form = stored.get("checkpoint_format", "gptq")
    _require("gptq", "checkpoint_format", form, ("gptq", "gptq_v2"))
    offset = 1 if form == "gptq" else 0
    order = tuple(range(32 // bits))

    def codes(parts: Parts) -> _Codes:
        codes = _columns(parts["qweight"].T, bits, order).T  # packed along the input
        zeros = (_columns(parts["qzeros"], bits, order) + offset) & (2**bits - 1)
        return _Codes(codes, zeros, parts["scales"], _group_size(stored), parts.get("g_idx"))

    names = frozenset({"qweight", "qzeros", "scales"})
    if stored.get("desc_act"):
        return _grouped(f"gptq, {bits} bits, reordered", names | {"g_idx"}, codes, None)
    unused = frozenset({"g_idx"})
    return _grouped(f"gptq, {bits} bits", names, codes, _packing(bits, stored), unused)


def _compressed(stored: Mapping[str, Any]) -> StoredWeights:
    form = str(stored.get("format"))
    known = ("int-quantized", "float-quantized", "naive-quantized")
    _require("compressed-tensors", "format", form, known)
    for group in (stored.get("config_groups") or {}).values():
        inputs, weights = group.get("input_activations") or {}, group.get("weights") or {}
        _require("compressed-tensors", "num_bits", weights.get("num_bits"), (8,))
        _require("compressed-tensors", "symmetric", weights.get("symmetric", True), (True,))
        strategy = weights.get("strategy", "channel")
        _require("compressed-tensors", "strategy", strategy, ("channel", "tensor"))
        dynamic = inputs.get("dynamic", True)
        _require("compressed-tensors", "dynamic of input_activations", dynamic, (True,))

    def weight(parts: Parts) -> torch.Tensor:
        return parts["weight"].float() * parts["weight_scale"].float()

    packing: Packing | None = None
    packed: Callable[[Parts], Parts] | None = None
    if form == "int-quantized":
        packing, packed = _INT8, _int8_parts
    elif form == "float-quantized":
        packing, packed = Fp8Packing(), _fp8_parts
    names = frozenset({"weight", "weight_scale"})
    return StoredWeights(form, names, weight, packing=packing, packed=packed)


_INT8 = IntPacking(8, 0)


def _int8_parts(parts: Parts) -> Parts:
    """Codes from -128 on, as a zero point of 128 has them."""
    scales = _row_scales(parts)
    return _INT8.parts(parts["weight"].int() + 128, scales, torch.full_like(scales, 128))


def _fp8_parts(parts: Parts) -> Parts:
    return {"codes": parts["weight"], "scales": _row_scales(parts)}


def _row_scales(parts: Parts) -> torch.Tensor:
    """[out, 1] of a scale for each output, or of one for all."""
    return parts["weight_scale"].float().reshape(-1, 1).expand(len(parts["weight"]), 1)


_READERS: dict[str, Callable[[Mapping[str, Any]], StoredWeights]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
}


def _require(method: str, field: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        expected = " or ".join(map(repr, known))
        raise UnsupportedModel(f"{method}: {field} must be {expected}, got {value!r}; {_PLAIN}")


def _is_quantized(weight: torch.Tensor) -> bool:
    return weight.dtype in (torch.int8, torch.float8_e4m3fn)


def _group_size(stored: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale; 0: all of an output; None: the config does not say."""
    size = stored.get("group_size")
    return None if size is None else max(int(size), 0)


def _packing(bits: int, stored: Mapping[str, Any]) -> IntPacking | None:
    size = _group_size(stored)
    return None if size is None else IntPacking(bits, size)


@dataclass(frozen=True, slots=True)
class _Codes:
    """A linear as the integers that are stored."""

    codes: torch.Tensor  # [in, out]
    zeros: torch.Tensor  # [G, out]
    scales: torch.Tensor  # [G, out]
    group_size: int | None
    order: torch.Tensor | None = None  # [in], the group of each input; None: one after another

    def floats(self) -> torch.Tensor:
        """The weight [out, in]."""
        depth = len(self.codes)
        groups = self.order
        if groups is None:
            size = self.group_size or depth // (len(self.zeros) if self.group_size is None else 1)
            groups = torch.arange(depth, device=self.codes.device) // size
        groups = groups.long()
        weight: torch.Tensor = (self.codes - self.zeros[groups]) * self.scales.float()[groups]
        return weight.t()


def _grouped(
    name: str,
    parts: frozenset[str],
    codes: Callable[[Parts], _Codes],
    packing: IntPacking | None,
    unused: frozenset[str] = frozenset(),
) -> StoredWeights:
    def weight(stored: Parts) -> torch.Tensor:
        return codes(stored).floats()

    def packed(stored: Parts) -> Parts:
        made = codes(stored)
        return packing.parts(made.codes.t(), made.scales.t(), made.zeros.t()) if packing else {}

    return StoredWeights(name, parts, weight, unused, packing, packed if packing else None)


def _columns(words: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """Integers [rows, columns] of int32 words [rows, columns / n]; part p is column `order[p]`."""
    shifts = torch.empty(len(order), dtype=torch.int32)
    shifts[list(order)] = bits * torch.arange(len(order), dtype=torch.int32)
    columns: torch.Tensor = (words[:, :, None] >> shifts.to(words.device)) & (2**bits - 1)
    return columns.flatten(1)
