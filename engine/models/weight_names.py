"""`WeightMap` of the families: what their checkpoints call the parts of the decoder.

Paths are those of `weight_map.py`: without the outer prefix, # for a number. Most names mean the
same wherever they occur, so that one table serves; whatever a model has no place for is refused,
and so is a checkpoint that leaves a place empty.
"""

from tokenmill.engine.models.weight_map import WeightMap

#: Outside the layers.
_TOP = {
    "embedding": ("embed_tokens", "wte", "embed_in", "word_embeddings"),
    "positions": ("embed_positions", "wpe"),
    "final_norm": ("norm", "ln_f", "final_layer_norm", "final_layernorm"),
    "lm_head": ("lm_head", "embed_out"),
}
#: Within a layer.
_LAYER = {
    "attention_norm": ("input_layernorm", "ln_1", "ln_attn", "self_attn_layer_norm"),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "qkv": ("self_attn.qkv_proj", "attn.c_attn"),
    "grouped_qkv": ("attention.query_key_value", "self_attention.query_key_value"),
    "q_norm": ("self_attn.q_norm", "self_attn.q_layernorm"),
    "k_norm": ("self_attn.k_norm", "self_attn.k_layernorm"),
    "attention_out": (
        "self_attn.o_proj",
        "self_attn.out_proj",
        "self_attn.dense",
        "self_attention.dense",
        "attention.dense",
        "attn.c_proj",
    ),
    "mlp_norm": ("post_attention_layernorm", "ln_2", "ln_mlp", "final_layer_norm"),
    "gate_up": ("mlp.gate_up_proj",),
    "gate": ("mlp.gate_proj", "mlp.w2"),
    "up": ("mlp.up_proj", "mlp.w1", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc1", "fc1"),
    "down": ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2"),
    "router": ("mlp.gate", "block_sparse_moe.gate"),
    "experts.#.gate": ("mlp.experts.#.gate_proj", "block_sparse_moe.experts.#.w1"),
    "experts.#.up": ("mlp.experts.#.up_proj", "block_sparse_moe.experts.#.w3"),
    "experts.#.down": ("mlp.experts.#.down_proj", "block_sparse_moe.experts.#.w2"),
    "shared.gate": ("mlp.shared_expert.gate_proj",),
    "shared.up": ("mlp.shared_expert.up_proj",),
    "shared.down": ("mlp.shared_expert.down_proj",),
    "shared_gate": ("mlp.shared_expert_gate",),
}
_NAMES = {path: place for place, paths in _TOP.items() for path in paths} | {
    f"{layers}.#.{path}": f"layers.#.{place}"
    for layers in ("layers", "h")
    for place, paths in _LAYER.items()
    for path in paths
}

COMMON = WeightMap(_NAMES)
#: GPT-2 stores its linears [in, out].
TRANSPOSED = WeightMap(_NAMES, transposed=True)
#: Of Gemma 2 and OLMo 2: norms of the outputs too, or alone.
POST_NORMS = WeightMap(
    _NAMES
    | {
        "layers.#.post_attention_layernorm": "layers.#.attention_post_norm",
        "layers.#.pre_feedforward_layernorm": "layers.#.mlp_norm",
        "layers.#.post_feedforward_layernorm": "layers.#.mlp_post_norm",
    }
)
