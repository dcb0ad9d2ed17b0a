"""Tiny checkpoints of every family, with every feature of the family on."""

import json
from pathlib import Path
from typing import Any

import torch

WINDOW = 12
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 5.0],
}
GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 256, "n_inner": 80}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {**LINEAR_ROPE, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 20}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-3.1-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "sliding_window": WINDOW}),
    "qwen": ("qwen2", {"num_key_value_heads": 6}),  # renamed below
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-with-images": ("gemma3_text", GEMMA3),  # renamed below
    "phi": (
        "phi",
        {"rope_parameters": {"partial_rotary_factor": 0.4, "rope_theta": 1e4}, "head_dim": 20},
    ),
    "phi-qk-norm": ("phi", {"qk_layernorm": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3-long-rope": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16},
    ),
    "falcon-7b": ("falcon", {"multi_query": True}),
    "falcon-40b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80},
    ),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-serial": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}),
    "gpt-neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt": ("opt", {"ffn_dim": 80}),
    "opt-no-bias": ("opt", {"ffn_dim": 80, "enable_bias": False, "activation_function": "gelu"}),
}


def first_qwen_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the first Qwen, whose code is not in transformers, that means this Qwen2."""
    kept = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    return {name: config[name] for name in kept} | {
        "model_type": "qwen",
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "max_position_embeddings": 512,
        "no_bias": True,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 256,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }


def first_qwen_tensors(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    paths = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.w1",
        "mlp.gate_proj": "mlp.w2",
        "mlp.down_proj": "mlp.c_proj",
    }
    tensors = {}
    for name, tensor in stored.items():
        if ".q_proj" in name:
            parts = [stored[name.replace(".q_proj", f".{x}_proj")] for x in "qkv"]
            name, tensor = name.replace("self_attn.q_proj", "attn.c_attn"), torch.cat(parts)  # noqa: PLW2901
        elif ".k_proj" in name or ".v_proj" in name:
            continue
        for theirs, ours in paths.items():
            name = name.replace(theirs, ours)  # noqa: PLW2901
        tensors[name] = tensor
    return tensors


def with_images_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a Gemma 3 that also sees images: the text's inside it."""
    return {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 8}}


def with_images_tensors(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    return tensors | {"vision_tower.vision_model.head.weight": torch.zeros(3)}


#: Cases that transformers cannot write as they are found: the config and the tensors are renamed.
RENAMED = {
    "qwen": (first_qwen_config, first_qwen_tensors),
    "gemma3-with-images": (with_images_config, with_images_tensors),
}


def rename(directory: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    config, tensors = RENAMED[name]
    file = directory / "config.json"
    file.write_text(json.dumps(config(json.loads(file.read_text()))))
    stored = load_file(directory / "model.safetensors")
    save_file(tensors(stored), directory / "model.safetensors")
