"""Reading GGUF files (the format of llama.cpp): metadata, tensors, Llama family.

The header is parsed here, in a fraction of the time that the `gguf` package's reader takes for a
large vocabulary. Blocks of the simple types are dequantized by a compiled kernel where there is
one, the many others by that package's `quants.dequantize`.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.checkpoint import NamedTensors
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.kernels import cpu_ops

if TYPE_CHECKING:
    import numpy as np

# GGUF value types -> struct codes; 8 is a string, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 1 << 24
_F32 = 0
#: Values and bytes of a block of the types that need no more of the `gguf` package, whose import
#: takes a while: GGML_TYPE_F32, Q4_0, Q4_1 and Q8_0.
_SIZES = {_F32: (1, 4), 2: (32, 18), 3: (32, 20), 8: (32, 34)}
#: Values that are dequantized at a time.
_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `shape` in torch's order, `offset` from the start of the file."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GGUFFile:
    """A mapped GGUF file: `metadata`, and tensors on demand.

    Raises:
        UnsupportedModel: not a GGUF file of version 2 or 3, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size == 0:
            raise UnsupportedModel(f"{path} is not a whole GGUF file: it is empty")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise UnsupportedModel(f"{path} is not a whole GGUF file: {error}") from error

    def _read_header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._map[:4] != b"GGUF":
            raise UnsupportedModel(f"{self.path} must start with 'GGUF', got {self._map[:4]!r}")
        self._at = 4
        version, num_tensors, num_values = self._unpack("<IQQ")
        if version not in (2, 3):
            raise UnsupportedModel(f"GGUF version must be 2 or 3, got {version}")
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            (kind,) = self._unpack("<I")
            metadata[key] = self._value(kind)
        found = {}
        for _ in range(num_tensors):
            name = self._string()
            (rank,) = self._unpack("<I")
            dims = self._unpack(f"<{rank}Q")
            ggml_type, offset = self._unpack("<IQ")
            found[name] = TensorInfo(tuple(reversed(dims)), ggml_type, offset)
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        return metadata, {
            name: TensorInfo(t.shape, t.ggml_type, t.offset + start) for name, t in found.items()
        }

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._map, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        end = self._at + length
        if end > len(self._map):
            raise IndexError("a string runs past the end of the file")
        text = self._map[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._unpack("<" + _SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise UnsupportedModel(f"{self.path} has a metadata value of unknown type {kind}")
        item_kind, count = self._unpack("<IQ")
        if count > _MAX_ITEMS:
            raise IndexError(f"an array of {count} items")
        if item_kind in _SCALARS:
            return list(self._unpack(f"<{count}{_SCALARS[item_kind]}"))
        return [self._value(item_kind) for _ in range(count)]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, dequantized to float32."""
        import numpy as np

        info = self.tensors[name]
        block, block_bytes = _SIZES.get(info.ggml_type) or _rare_sizes(name, info.ggml_type)
        if info.shape[-1:] and info.shape[-1] % block:
            raise UnsupportedModel(
                f"{self.path} is damaged: rows of {name} must be whole blocks of {block}, "
                f"got {info.shape[-1]} values"
            )
        count = math.prod(info.shape)
        size = count // block * block_bytes
        if info.offset + size > len(self._map):
            raise UnsupportedModel(f"{self.path} is not a whole GGUF file: {name} is cut short")
        raw = np.frombuffer(self._map, np.uint8, count=size, offset=info.offset)
        values = torch.empty(count, dtype=torch.float32)
        if info.ggml_type == _F32:
            values.numpy()[:] = raw.view(np.float32)
        elif cpu_ops.can_dequantize(info.ggml_type):
            cpu_ops.dequantize(raw, info.ggml_type, values)
        else:
            _dequantize(name, info.ggml_type, raw, values.numpy())
        return values.reshape(info.shape)


def _rare_sizes(name: str, ggml_type: int) -> tuple[int, int]:
    """Values and bytes of a block of any type that the `gguf` package knows."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        sizes: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    except ValueError as error:
        raise UnsupportedModel(f"{name} is of an unknown GGUF type: {error}") from error
    return sizes


def _dequantize(
    name: str, ggml_type: int, raw: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]"
) -> None:
    """Write what the blocks in `raw` stand for to `values`, as the `gguf` package does it."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(ggml_type)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    # A piece at a time, given as one row: what is made on the way stays in the cache.
    step = max(_PIECE // block, 1)
    try:
        with np.errstate(all="ignore"):
            for first in range(0, len(raw) // block_bytes, step):
                piece = raw[first * block_bytes : (first + step) * block_bytes]
                part = dequantize(piece[np.newaxis], kind).reshape(-1)
                values[first * block : first * block + len(part)] = part
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{name} is of a GGUF type that cannot be read: {kind.name}"
        ) from error


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """The Hugging Face config that GGUF metadata of the Llama architecture stands for.

    Raises:
        UnsupportedModel: another architecture, a scaling that GGUF names and we do not know, or
            metadata that is not whole.
    """
    try:
        return _config(metadata, tensors)
    except KeyError as error:
        raise UnsupportedModel(f"the GGUF file lacks {error}; fetch it again") from error


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"general.architecture must be 'llama', got {architecture!r}; "
            "use the safetensors form of this model"
        )
    if "rope_freqs.weight" in tensors or metadata.get("llama.rope.scaling.type", "none") != "none":
        raise UnsupportedModel("a GGUF with scaled rotary positions: use its safetensors form")
    heads = metadata["llama.attention.head_count"]
    return {
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.rope.dimension_count"),
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensors_of(file: GGUFFile, spec: ModelSpec) -> NamedTensors:
    """Every tensor under its Hugging Face name, query and key rows in half-split rotary order."""
    for name in file.tensors:
        tensor = file.tensor(name)
        if name in _NAMES:
            yield _NAMES[name], tensor
            continue
        fields = name.split(".")
        if len(fields) != 4:
            raise UnsupportedModel(f"the GGUF file has a tensor of no known place: {name}")
        _, number, part, kind = fields
        if part in ("attn_q", "attn_k"):
            heads = spec.num_heads if part == "attn_q" else spec.num_kv_heads
            tensor = _half_split(tensor, heads)
        yield f"model.layers.{number}.{_LAYER_NAMES.get(part, part)}.{kind}", tensor


def _half_split(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF interleaves each rotary pair; Hugging Face keeps the two halves apart."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
