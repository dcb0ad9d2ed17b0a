"""`PackedWeights`: the weights as the decoder computes with them, each linear laid out once."""

from dataclasses import dataclass

import torch

from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.weights import LayerWeights, ModelWeights


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One decoder layer; the norms are plain vectors."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    attention_out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """All weights of a model, ready to run."""

    embedding: torch.Tensor  # [V, H]
    layers: list[PackedLayer]
    final_norm: torch.Tensor  # [H]
    lm_head: Linear


def pack(weights: ModelWeights) -> PackedWeights:
    """Lay out `weights`, which is used up: each layer is freed as it is packed.

    A packed layer is a copy on a CPU in float32, so at no time more than one layer, and a tied
    head, is in memory twice.
    """
    layers = []
    while weights.layers:
        layers.append(_pack_layer(weights.layers.pop(0)))
    return PackedWeights(weights.embedding, layers, weights.final_norm, Linear(weights.lm_head))


def _pack_layer(layer: LayerWeights) -> PackedLayer:
    return PackedLayer(
        attention_norm=layer.attention_norm,
        qkv=Linear(layer.qkv, layer.qkv_bias),
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        attention_out=Linear(layer.attention_out),
        mlp_norm=layer.mlp_norm,
        gate_up=Linear(layer.gate_up),
        down=Linear(layer.down),
    )
