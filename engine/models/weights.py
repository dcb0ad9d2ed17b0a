"""Weights of a model, fused (qkv, gate-up) while they stream in, one tensor at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenmill.engine.errors import OutOfMemory, UnsupportedModel
from tokenmill.engine.json_file import read_json
from tokenmill.engine.models.spec import ModelSpec

#: A named tensor as a checkpoint stores it.
NamedTensors = Iterator[tuple[str, torch.Tensor]]


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; H hidden, I intermediate, D head size, Hq / Hkv heads."""

    attention_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [(Hq + 2 Hkv) * D, H]
    qkv_bias: torch.Tensor | None  # [(Hq + 2 Hkv) * D]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None  # [D]
    attention_out: torch.Tensor  # [H, Hq * D]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 I, H]
    down: torch.Tensor  # [H, I]


@dataclass(slots=True)
class ModelWeights:
    """All weights of a model; `lm_head` is the embedding itself where they are tied."""

    embedding: torch.Tensor  # [V, H]
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [H]
    lm_head: torch.Tensor  # [V, H]


def empty_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Allocate the fused tensors, uninitialised.

    Raises:
        OutOfMemory: the device has no room for them.
    """
    try:
        return _empty_weights(spec, dtype, device)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, the plain class on a CPU
        raise OutOfMemory(f"the weights do not fit {device}: {error}") from error


def _empty_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> ModelWeights:

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size = spec.num_heads * spec.head_dim
    qkv_size = q_size + 2 * spec.num_kv_heads * spec.head_dim
    layers = [
        LayerWeights(
            attention_norm=new(hidden),
            qkv=new(qkv_size, hidden),
            qkv_bias=new(qkv_size) if spec.qkv_bias else None,
            q_norm=new(spec.head_dim) if spec.qk_norm else None,
            k_norm=new(spec.head_dim) if spec.qk_norm else None,
            attention_out=new(hidden, q_size),
            mlp_norm=new(hidden),
            gate_up=new(2 * inner, hidden),
            down=new(hidden, inner),
        )
        for _ in range(spec.num_layers)
    ]
    embedding = new(spec.vocab_size, hidden)
    lm_head = embedding if spec.tied_embeddings else new(spec.vocab_size, hidden)
    return ModelWeights(embedding, layers, new(hidden), lm_head)


def fill_weights(weights: ModelWeights, spec: ModelSpec, tensors: NamedTensors) -> None:
    """Copy every tensor of a Llama-named checkpoint to its place.

    Raises:
        UnsupportedModel: a tensor is unknown, missing, or of another shape.
    """
    places = _places(weights, spec)
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq") or (
            name == "lm_head.weight" and name not in places
        ):
            continue  # derived, or stored although tied
        place = places.pop(name, None)
        if place is None:
            raise UnsupportedModel(f"the checkpoint has a tensor of no known place: {name}")
        if place.shape != tensor.shape:
            raise UnsupportedModel(
                f"{name} must have shape {tuple(place.shape)}, got {tuple(tensor.shape)}"
            )
        place.copy_(tensor)
    if places:
        raise UnsupportedModel(f"the checkpoint lacks {len(places)} tensors: {sorted(places)[:3]}")


def _places(weights: ModelWeights, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Checkpoint name -> view of the fused tensor that it fills."""
    places = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not spec.tied_embeddings:
        places["lm_head.weight"] = weights.lm_head
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    for number, layer in enumerate(weights.layers):
        prefix = f"model.layers.{number}."
        named: dict[str, torch.Tensor | None] = {
            "input_layernorm.weight": layer.attention_norm,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "self_attn.o_proj.weight": layer.attention_out,
            "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm,
            "mlp.down_proj.weight": layer.down,
            "mlp.gate_proj.weight": layer.gate_up[: spec.intermediate_size],
            "mlp.up_proj.weight": layer.gate_up[spec.intermediate_size :],
        }
        for kind, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if fused is not None:
                q, k, v = fused.split_with_sizes([q_size, kv_size, kv_size])
                named |= {
                    f"self_attn.{x}_proj.{kind}": t for x, t in zip("qkv", (q, k, v), strict=True)
                }
        places |= {prefix + name: place for name, place in named.items() if place is not None}
    return places


def safetensors_of(directory: Path) -> NamedTensors:
    """Every tensor of a directory's safetensors files, one at a time, mapped from disk.

    Raises:
        UnsupportedModel: there is no such file, or one is broken.
    """
    from safetensors import SafetensorError, safe_open

    for file in _shards(directory):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(
                f"{file} is not a whole safetensors file: {error}; pull it again"
            ) from error


def _shards(directory: Path) -> list[Path]:
    """The files that the index names, or the only file: others may hold the same weights again."""
    index = read_json(directory / "model.safetensors.index.json")
    if index:
        named = index.get("weight_map")
        return sorted({directory / file for file in named.values()}) if named else []
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(
            f"{directory} holds no *.safetensors; convert the model to safetensors first"
        )
    return files


def random_weights(weights: ModelWeights, seed: int) -> None:
    """Fill with seeded noise of a trained model's size: for benches where no weights can be had."""
    generator = torch.Generator(device=weights.embedding.device).manual_seed(seed)
    for layer in weights.layers:
        for matrix in (layer.qkv, layer.attention_out, layer.gate_up, layer.down):
            matrix.normal_(0.0, matrix.shape[1] ** -0.5, generator=generator)
        for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm):
            if norm is not None:
                norm.fill_(1.0)
        if layer.qkv_bias is not None:
            layer.qkv_bias.zero_()
    weights.embedding.normal_(0.0, 1.0, generator=generator)
    weights.final_norm.fill_(1.0)
    if weights.lm_head is not weights.embedding:
        weights.lm_head.normal_(0.0, weights.lm_head.shape[1] ** -0.5, generator=generator)
