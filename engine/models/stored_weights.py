"""Checkpoints whose linears are stored quantized, read as the floats that they stand for.

| format             | of a linear [out, in] are stored                                            |
| ------------------ | --------------------------------------------------------------------------- |
| awq (gemm)         | qweight int32 [in, out / 8], qzeros int32 [in / G, out / 8], scales         |
|                    | [in / G, out]; 4 bits, eight along `out` in the order 0 2 4 6 1 3 5 7       |
| gptq               | qweight int32 [in / n, out], qzeros int32 [in / G, out / n], scales         |
|                    | [in / G, out], g_idx [in]; n = 32 / bits in order; 4 or 8 bits; a stored    |
|                    | zero point is one too small (not so in gptq_v2)                             |
| compressed-tensors | weight int8 or float8_e4m3fn [out, in], weight_scale [out, 1] or [1]        |

    w[o, i] = scale[g, o] * (q[o, i] - zero[g, o])        g the group of input i
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.checkpoint import NamedTensors

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

    def floats(self, tensors: NamedTensors) -> NamedTensors:
        """The tensors of a checkpoint with a float32 weight in place of the parts of each linear.

        Raises:
            UnsupportedModel: a linear lacks a part, or its parts do not fit each other.
        """
        held: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            path, _, kind = name.rpartition(".")
            if kind in self.unused:
                continue
            if kind not in self.parts or (kind == "weight" and not _is_quantized(tensor)):
                yield name, tensor
                continue
            parts = held.setdefault(path, {})
            parts[kind] = tensor
            if parts.keys() == self.parts:
                yield f"{path}.weight", self._made(path, held.pop(path))
        if held:
            path, parts = next(iter(held.items()))
            missing = ", ".join(sorted(self.parts - parts.keys()))
            raise UnsupportedModel(f"{path} lacks {missing}; pull the model again")

    def _made(self, path: str, parts: Parts) -> torch.Tensor:
        try:
            return self.weight(parts)
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
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

    def weight(parts: Parts) -> torch.Tensor:
        codes = _columns(parts["qweight"], 4, _AWQ_ORDER)
        zeros = _columns(parts["qzeros"], 4, _AWQ_ORDER)
        groups = torch.arange(len(codes)) // (len(codes) // len(zeros))
        return _dequantized(codes, zeros, parts["scales"], groups)

    return StoredWeights("awq, 4 bits", frozenset({"qweight", "qzeros", "scales"}), weight)


def _gptq(stored: Mapping[str, Any]) -> StoredWeights:
    bits = stored.get("bits")
    _require("gptq", "bits", bits, (4, 8))
    form = stored.get("checkpoint_format", "gptq")
    _require("gptq", "checkpoint_format", form, ("gptq", "gptq_v2"))
    offset = 1 if form == "gptq" else 0
    is_reordered = bool(stored.get("desc_act"))
    order = tuple(range(32 // int(bits or 4)))

    def weight(parts: Parts) -> torch.Tensor:
        codes = _columns(parts["qweight"].T, int(bits or 4), order).T  # packed along the input
        zeros = _columns(parts["qzeros"], int(bits or 4), order)
        zeros = (zeros + offset) & (2 ** int(bits or 4) - 1)
        groups = torch.arange(len(codes)) // (len(codes) // len(zeros))
        groups = parts["g_idx"].long() if is_reordered else groups
        return _dequantized(codes, zeros, parts["scales"], groups)

    parts = frozenset({"qweight", "qzeros", "scales"})
    if is_reordered:
        return StoredWeights(f"gptq, {bits} bits, reordered", parts | {"g_idx"}, weight)
    return StoredWeights(f"gptq, {bits} bits", parts, weight, frozenset({"g_idx"}))


def _compressed(stored: Mapping[str, Any]) -> StoredWeights:
    form = stored.get("format")
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

    return StoredWeights(str(form), frozenset({"weight", "weight_scale"}), weight)


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


def _columns(words: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """Integers [rows, columns] of int32 words [rows, columns / n]; part p is column `order[p]`."""
    shifts = torch.empty(len(order), dtype=torch.int32)
    shifts[list(order)] = bits * torch.arange(len(order), dtype=torch.int32)
    columns: torch.Tensor = (words[:, :, None] >> shifts) & (2**bits - 1)
    return columns.flatten(1)


def _dequantized(
    codes: torch.Tensor,  # [in, out]
    zeros: torch.Tensor,  # [in / G, out]
    scales: torch.Tensor,  # [in / G, out]
    groups: torch.Tensor,  # [in]
) -> torch.Tensor:
    weight: torch.Tensor = (codes - zeros[groups]) * scales.float()[groups]
    return weight.t()
