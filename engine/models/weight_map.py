"""From the names of a checkpoint to places in the fused weights.

A family's map goes from module paths, without their outer prefix and with # for a number, to places
of ours. A place ending in `qkv` or `gate_up` is a fused tensor, which is split into its parts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.checkpoint import NamedTensors
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.mlp import MLP
from tokenmill.engine.models.norm import Norm
from tokenmill.engine.models.shard import WHOLE, Cut, Shard
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.weights import ModelWeights

#: Where a checkpoint keeps the decoder; the first that fits is dropped.
_PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.decoder.",
    "decoder.",
    "transformer.",
    "gpt_neox.",
    "model.",
)
#: What is derived from the config, and what serves images.
_IGNORED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
_IGNORED_TREES = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class WeightMap:
    """`names`: module path -> place; `transposed`: linears are stored [in, out] (GPT-2)."""

    names: Mapping[str, str]
    transposed: bool = False


def fill_weights(
    weights: ModelWeights,
    spec: ModelSpec,
    names: WeightMap,
    tensors: NamedTensors,
    shard: Shard = WHOLE,
) -> None:
    """Copy every tensor of a checkpoint, or the shard's part of it, to its place.

    `spec` is that of the whole model. Of a tensor mapped from disk only the part is read.

    Raises:
        UnsupportedModel: a tensor is unknown, missing, or of another shape.
    """
    places = dict(_places(weights, shard.spec(spec)))
    with torch.no_grad():
        for name, tensor in tensors:
            for part, values in _parts(name, tensor, spec, names):
                if (part == "lm_head.weight" and spec.tied_embeddings) or shard.lacks(part):
                    continue  # stored although tied, or of another rank
                place = places.pop(part, None)
                if place is None:
                    raise _unknown(name)
                place.copy_(_cut(name, values, place, shard.cut(part, spec)))
        if places:
            raise UnsupportedModel(
                f"the checkpoint lacks {len(places)} tensors: {sorted(places)[:3]}"
            )
        for norm in weights.norms():
            norm.weight += spec.norm_offset


def _cut(name: str, values: torch.Tensor, place: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    """The part of a stored tensor that goes to `place`."""
    shape = list(place.shape)
    if cut is not None:
        shape[cut.dim] = cut.total
    if shape != list(values.shape):
        raise UnsupportedModel(f"{name} must have shape {tuple(shape)}, got {tuple(values.shape)}")
    return values if cut is None else values.narrow(cut.dim, cut.start, cut.stop - cut.start)


def _unknown(name: str) -> UnsupportedModel:
    return UnsupportedModel(f"the checkpoint has a tensor of no known place: {name}")


def _parts(
    name: str, tensor: torch.Tensor, spec: ModelSpec, names: WeightMap
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a stored tensor fills: nothing, one place, or the parts of a fused one."""
    if name.endswith(_IGNORED) or any(tree in name for tree in _IGNORED_TREES):
        return
    kind = name.rpartition(".")[2]
    place = place_of(name, names)
    if place is None:
        raise _unknown(name)
    if names.transposed and kind == "weight" and tensor.dim() == 2 and place.startswith("layers."):
        tensor = tensor.T
    layer, _, fused = place.rpartition(".")
    try:
        for part, values in split_fused(fused, tensor, spec):
            yield f"{layer}.{part}.{kind}".removeprefix("."), values
    except RuntimeError as error:
        raise UnsupportedModel(
            f"{name} has the shape {tuple(tensor.shape)}, which cannot be split: {error}"
        ) from error


def place_of(name: str, names: WeightMap) -> str | None:
    """The place that the module of a stored tensor has; None: it is unknown."""
    prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
    steps = name.removeprefix(prefix).split(".")[:-1]
    numbers = iter([step for step in steps if step.isdigit()])
    place = names.names.get(".".join("#" if step.isdigit() else step for step in steps))
    if place is None:
        return None
    return ".".join(next(numbers) if step == "#" else step for step in place.split("."))


def split_fused(
    fused: str, tensor: torch.Tensor, spec: ModelSpec
) -> Iterator[tuple[str, torch.Tensor]]:
    """The rows of a stored tensor by the part of ours; RuntimeError where they do not fit."""
    if fused == "qkv":
        sizes = [spec.q_size, spec.kv_size, spec.kv_size]
        yield from zip("qkv", tensor.split_with_sizes(sizes), strict=True)
    elif fused == "grouped_qkv":  # for each KV head its query heads, then its key and its value
        group = spec.num_heads // spec.num_kv_heads
        heads = tensor.view(spec.num_kv_heads, group + 2, spec.head_dim, *tensor.shape[1:])
        for part, rows in zip("qkv", heads.split_with_sizes([group, 1, 1], dim=1), strict=True):
            yield part, rows.flatten(0, 2)
    elif fused == "gate_up":
        yield from zip(("gate", "up"), tensor.chunk(2), strict=True)
    elif fused == "positions":
        yield fused, tensor[spec.position_offset :]
    else:
        yield fused, tensor


def _places(weights: ModelWeights, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Place -> the view of the fused tensor that it fills."""
    yield "embedding.weight", weights.embedding
    if weights.positions is not None:
        yield "positions.weight", weights.positions
    if not spec.tied_embeddings:
        yield "lm_head.weight", weights.lm_head.weight
    if weights.lm_head.bias is not None:
        yield "lm_head.bias", weights.lm_head.bias
    yield from _norm("final_norm", weights.final_norm)
    for number, layer in enumerate(weights.layers):
        prefix = f"layers.{number}."
        for name, norm in layer.norms().items():
            yield from _norm(prefix + name, norm)
        sizes = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
        yield from _rows(prefix, layer.qkv, sizes)
        yield from _whole(prefix + "attention_out", layer.attention_out)
        mlp = layer.mlp
        if isinstance(mlp, MLP):
            yield from _mlp(prefix, mlp)
            continue
        yield from _whole(prefix + "router", mlp.router)
        for expert_number, expert in enumerate(mlp.experts):
            yield from _mlp(f"{prefix}experts.{expert_number}.", expert)
        if mlp.shared is not None and mlp.shared_gate is not None:
            yield from _mlp(prefix + "shared.", mlp.shared)
            yield from _whole(prefix + "shared_gate", mlp.shared_gate)


def _mlp(prefix: str, mlp: MLP) -> Iterator[tuple[str, torch.Tensor]]:
    inner = mlp.down.weight.shape[1]
    yield from _rows(prefix, mlp.up, {"gate": inner, "up": inner} if mlp.gated else {"up": inner})
    yield from _whole(prefix + "down", mlp.down)


def _norm(place: str, norm: Norm) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{place}.weight", norm.weight
    if norm.bias is not None:
        yield f"{place}.bias", norm.bias


def _whole(place: str, linear: Linear) -> Iterator[tuple[str, torch.Tensor]]:
    for kind, tensor in linear.parts().items():
        yield f"{place}.{kind}", tensor


def _rows(
    prefix: str, linear: Linear, sizes: Mapping[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts of a fused linear, each with its number of rows."""
    start = 0
    for part, size in sizes.items():
        for kind, tensor in linear.parts().items():
            yield f"{prefix}{part}.{kind}", tensor[start : start + size]
        start += size
