"""The weight map: fused tensors come apart where they should, and what does not fit is named."""

from typing import Any

import pytest
import torch

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.families import FAMILIES, spec_from_config
from tokenmill.engine.models.mlp import MoE
from tokenmill.engine.models.quantization import Scheme
from tokenmill.engine.models.weight_map import fill_weights
from tokenmill.engine.models.weights import ModelWeights, empty_weights, pack

CONFIG = {
    "vocab_size": 7,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 16,
}


def filled(
    family: str, tensors: dict[str, torch.Tensor], **config: Any
) -> tuple[ModelWeights, UnsupportedModel]:
    """Weights after these tensors alone, and the complaint that others are lacking."""
    spec = spec_from_config(CONFIG | config | {"model_type": family})
    weights = empty_weights(spec, torch.float32, torch.device("cpu"))
    with pytest.raises(UnsupportedModel) as refused:
        fill_weights(weights, spec, FAMILIES[family].weight_map, iter(tensors.items()))
    return weights, refused.value


def test_grouped_heads_are_put_in_order() -> None:
    """Falcon-40B: for each KV head its two query heads, its key and its value; heads of 2 rows."""
    stored = torch.arange(16.0).unsqueeze(1).expand(16, 8)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    weights, _ = filled("falcon", {name: stored}, new_decoder_architecture=True)
    rows = weights.layers[0].qkv.weight[:, 0].tolist()
    assert rows == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def test_a_fused_tensor_of_another_size_is_named() -> None:
    name = "transformer.h.0.self_attention.query_key_value.weight"
    _, error = filled("falcon", {name: torch.zeros(15, 8)}, new_decoder_architecture=True)
    assert str(error).startswith(f"{name} has the shape (15, 8), which cannot be split")


def test_positions_before_the_first_are_left_out() -> None:
    stored = torch.arange(18.0).unsqueeze(1).expand(18, 8)
    weights, _ = filled("opt", {"model.decoder.embed_positions.weight": stored}, ffn_dim=6)
    assert weights.positions is not None
    assert weights.positions[:, 0].tolist() == list(range(2, 18))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.layers.0.weight"]
)
def test_what_is_derived_or_serves_images_is_passed_over(name: str) -> None:
    _, error = filled("llama", {name: torch.zeros(3)})
    assert str(error).startswith("the checkpoint lacks 12 tensors: ['embedding.weight', ")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.extra.weight", "x"])
def test_an_unknown_tensor_is_named(name: str) -> None:
    _, error = filled("llama", {name: torch.zeros(3)})
    assert str(error) == f"the checkpoint has a tensor of no known place: {name}"


def test_experts_off_a_cpu_are_parts_of_stacked_weights() -> None:
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    weights = empty_weights(spec_from_config(config), torch.bfloat16, torch.device("meta"))
    experts = weights.layers[0].mlp
    assert isinstance(experts, MoE)
    assert experts.stacks is not None
    assert [tuple(stack.shape) for stack in experts.stacks] == [(3, 12, 8), (3, 8, 6)]
    for number, expert in enumerate(experts.experts):
        for linear, stack in zip(expert.linears(), experts.stacks, strict=True):
            assert linear.weight.storage_offset() == number * stack[0].numel()
            assert linear.weight.untyped_storage()._cdata == stack.untyped_storage()._cdata
    pack(weights, Scheme("plain", lambda weight, bits: Plain(), has_head=True))
    assert experts.stacks is None  # the linears are quantized, each by itself


class Plain:
    """A quantized linear, as far as `pack` is concerned."""

    nbytes = 0

    def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return rows
