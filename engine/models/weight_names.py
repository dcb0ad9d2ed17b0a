"""`WeightMap` of each family: what its checkpoints call the parts of the decoder.

Paths are those of `weight_map.py`: without the outer prefix, # for a number.
"""

from collections.abc import Mapping

from tokenmill.engine.models.weight_map import WeightMap


def _names(
    top: Mapping[str, str], layers: str, each: Mapping[str, str], *, transposed: bool = False
) -> WeightMap:
    """`top` outside the layers; `each` within a layer, whose paths start with `layers` and #."""
    inside = {f"{layers}.#.{path}": f"layers.#.{place}" for path, place in each.items()}
    return WeightMap({**top, **inside}, transposed)


_TOP = {"embed_tokens": "embedding", "norm": "final_norm", "lm_head": "lm_head"}
_ATTENTION = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "attention_out",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
}
_PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_MLP = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}

LLAMA = _names(_TOP, "layers", {**_ATTENTION, **_PRE_NORMS, **_MLP})

#: Norms of the outputs alone.
OLMO2 = _names(
    _TOP,
    "layers",
    {
        **_ATTENTION,
        **_MLP,
        "post_attention_layernorm": "attention_post_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
)

#: Norms on both sides.
GEMMA2 = _names(
    _TOP,
    "layers",
    {
        **_ATTENTION,
        **_MLP,
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
)

PHI3 = _names(
    _TOP,
    "layers",
    {
        **_PRE_NORMS,
        "self_attn.qkv_proj": "qkv",
        "self_attn.o_proj": "attention_out",
        "mlp.gate_up_proj": "gate_up",
        "mlp.down_proj": "down",
    },
)

MIXTRAL = _names(
    _TOP,
    "layers",
    {
        **_ATTENTION,
        **_PRE_NORMS,
        "block_sparse_moe.gate": "router",
        "block_sparse_moe.experts.#.w1": "experts.#.gate",
        "block_sparse_moe.experts.#.w3": "experts.#.up",
        "block_sparse_moe.experts.#.w2": "experts.#.down",
    },
)

#: Qwen2-MoE and Qwen3-MoE; layers without experts are Llama's.
QWEN_MOE = _names(
    _TOP,
    "layers",
    {
        **_ATTENTION,
        **_PRE_NORMS,
        **_MLP,
        "mlp.gate": "router",
        "mlp.experts.#.gate_proj": "experts.#.gate",
        "mlp.experts.#.up_proj": "experts.#.up",
        "mlp.experts.#.down_proj": "experts.#.down",
        "mlp.shared_expert.gate_proj": "shared.gate",
        "mlp.shared_expert.up_proj": "shared.up",
        "mlp.shared_expert.down_proj": "shared.down",
        "mlp.shared_expert_gate": "shared_gate",
    },
)

#: The first Qwen: w2 is the gate.
QWEN = _names(
    {"wte": "embedding", "ln_f": "final_norm", "lm_head": "lm_head"},
    "h",
    {
        "ln_1": "attention_norm",
        "attn.c_attn": "qkv",
        "attn.c_proj": "attention_out",
        "ln_2": "mlp_norm",
        "mlp.w1": "up",
        "mlp.w2": "gate",
        "mlp.c_proj": "down",
    },
)

GPT2 = _names(
    {"wte": "embedding", "wpe": "positions", "ln_f": "final_norm", "lm_head": "lm_head"},
    "h",
    {
        "ln_1": "attention_norm",
        "attn.c_attn": "qkv",
        "attn.c_proj": "attention_out",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
    transposed=True,
)

GPT_NEOX = _names(
    {"embed_in": "embedding", "final_layer_norm": "final_norm", "embed_out": "lm_head"},
    "layers",
    {
        **_PRE_NORMS,
        "attention.query_key_value": "grouped_qkv",
        "attention.dense": "attention_out",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
)

FALCON = _names(
    {"word_embeddings": "embedding", "ln_f": "final_norm", "lm_head": "lm_head"},
    "h",
    {
        **_PRE_NORMS,
        "ln_attn": "attention_norm",
        "ln_mlp": "mlp_norm",
        "self_attention.query_key_value": "grouped_qkv",
        "self_attention.dense": "attention_out",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
)

OPT = _names(
    {
        "embed_tokens": "embedding",
        "embed_positions": "positions",
        "final_layer_norm": "final_norm",
        "lm_head": "lm_head",
    },
    "layers",
    {
        **_ATTENTION,
        "self_attn.out_proj": "attention_out",
        "self_attn_layer_norm": "attention_norm",
        "final_layer_norm": "mlp_norm",
        "fc1": "up",
        "fc2": "down",
    },
)

PHI = _names(
    {"embed_tokens": "embedding", "final_layernorm": "final_norm", "lm_head": "lm_head"},
    "layers",
    {
        **_ATTENTION,
        "self_attn.dense": "attention_out",
        "self_attn.q_layernorm": "q_norm",
        "self_attn.k_layernorm": "k_norm",
        "input_layernorm": "attention_norm",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    },
)
