"""`FAMILIES`: how each family's config becomes a `ModelSpec`, and where its weights go.

A family is data for the one decoder: the fields of its spec that are not read alike for all, its
names for the common config fields, what older configs leave out, and its weight map.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models import family_fields as fields
from tokenmill.engine.models import weight_names as names
from tokenmill.engine.models.family_fields import Config, Fields
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.weight_map import WeightMap


@dataclass(frozen=True, slots=True)
class Family:
    """`models` is what users know it as; the rest as in the docstring of this module."""

    models: str
    weight_map: WeightMap
    read: Callable[[Config], Fields]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def spec_from_config(config: Config) -> ModelSpec:
    """Read a Hugging Face config.

    Raises:
        UnsupportedModel: a family or a feature that the decoder does not have.
    """
    try:
        return _spec(config)
    except KeyError as error:
        raise UnsupportedModel(f"the model's config lacks {error}; pull it again") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UnsupportedModel(f"the model's config has a wrong value: {error}") from error


def _spec(config: Config) -> ModelSpec:
    name = str(config.get("model_type", "?"))
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {name!r}; "
            "choose a model of a supported family"
        )
    family = FAMILIES[name]
    config = {**config, **config.get("text_config", {})}
    own = {common: config[theirs] for theirs, common in family.aliases.items() if theirs in config}
    config = {**family.defaults, **config, **own}
    if config.get("quantization_config"):
        raise UnsupportedModel("quantized weights are not supported; choose the unquantized model")
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    layers = int(config["num_hidden_layers"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    config["head_dim"] = head_dim
    common: dict[str, Any] = {
        "family": name,
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": hidden,
        "intermediate_size": int(config["intermediate_size"] or 4 * hidden),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "max_position": int(config.get("max_position_embeddings", 2048)),
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "attention_scale": head_dim**-0.5,
        "activation": fields.activation(config),
        "ropes": (fields.rope(config),) * layers,
        "windows": (None,) * layers,
    }
    spec = {**common, **family.read(config)}
    for per_layer in ("ropes", "windows"):
        if len(spec[per_layer]) != layers:
            raise ValueError(f"{per_layer} of {len(spec[per_layer])} layers, not of {layers}")
    return ModelSpec(**spec)


_TIED = {"tie_word_embeddings": True}
_EXPERTS = {"num_local_experts": "num_experts"}
_GEMMA = {**_TIED, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA3 = {**_GEMMA, "rope_theta": 1e6, "query_pre_attn_scalar": 256, "sliding_window": 4096}

#: model_type in config.json -> the family.
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 1 to 3, SmolLM, SmolLM2, TinyLlama, Yi", names.LLAMA, fields.llama),
    "mistral": Family("Mistral", names.LLAMA, fields.mistral),
    "mixtral": Family("Mixtral", names.MIXTRAL, fields.mixtral, _EXPERTS, {"norm_topk_prob": True}),
    "qwen": Family(
        "Qwen (first)",
        names.QWEN,
        fields.qwen,
        {
            "kv_channels": "head_dim",
            "layer_norm_epsilon": "rms_norm_eps",
            "rotary_emb_base": "rope_theta",
            "rotary_pct": "partial_rotary_factor",
        },
    ),
    "qwen2": Family("Qwen2, Qwen2.5, QwQ", names.LLAMA, fields.qwen2),
    "qwen2_moe": Family(
        "Qwen1.5-MoE, Qwen2-MoE",
        names.QWEN_MOE,
        fields.qwen2_moe,
        _EXPERTS,
        {"norm_topk_prob": False},
    ),
    "qwen3": Family("Qwen3", names.LLAMA, fields.qwen3),
    "qwen3_moe": Family(
        "Qwen3-MoE", names.QWEN_MOE, fields.qwen3_moe, _EXPERTS, {"norm_topk_prob": False}
    ),
    "olmo2": Family("OLMo 2", names.OLMO2, fields.olmo2),
    "smollm3": Family("SmolLM3", names.LLAMA, fields.smollm3, {}, {**_TIED, "rope_theta": 2e6}),
    "gemma": Family("Gemma", names.LLAMA, fields.gemma1, {}, _GEMMA),
    "gemma2": Family(
        "Gemma 2", names.GEMMA2, fields.gemma2, {"hidden_activation": "hidden_act"}, _GEMMA
    ),
    "gemma3_text": Family(
        "Gemma 3 (270M, 1B)",
        names.GEMMA2,
        fields.gemma3,
        {"hidden_activation": "hidden_act"},
        _GEMMA3,
    ),
    "gemma3": Family(
        "Gemma 3 (4B and larger: the text alone)",
        names.GEMMA2,
        fields.gemma3,
        {"hidden_activation": "hidden_act"},
        {
            **_GEMMA3,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
        },
    ),
    "phi": Family(
        "Phi-1, Phi-1.5, Phi-2",
        names.PHI,
        fields.phi,
        {"layer_norm_eps": "rms_norm_eps"},
        {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    ),
    "phi3": Family("Phi-3, Phi-3.5, Phi-4", names.PHI3, fields.mistral),
    "falcon": Family(
        "Falcon 7B, 40B, 180B, 11B",
        names.FALCON,
        fields.falcon,
        {
            "activation": "hidden_act",
            "ffn_hidden_size": "intermediate_size",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        {**_TIED, "hidden_act": "gelu", "rms_norm_eps": 1e-5, "intermediate_size": None},
    ),
    "gpt2": Family(
        "GPT-2",
        names.GPT2,
        fields.gpt2,
        {
            "n_embd": "hidden_size",
            "n_head": "num_attention_heads",
            "n_layer": "num_hidden_layers",
            "n_positions": "max_position_embeddings",
            "n_inner": "intermediate_size",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        {**_TIED, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "intermediate_size": None},
    ),
    "gpt_neox": Family(
        "GPT-NeoX, Pythia",
        names.GPT_NEOX,
        fields.gpt_neox,
        {
            "layer_norm_eps": "rms_norm_eps",
            "rotary_emb_base": "rope_theta",
            "rotary_pct": "partial_rotary_factor",
        },
        {"hidden_act": "gelu", "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    "opt": Family(
        "OPT (all but 350M)",
        names.OPT,
        fields.opt,
        {"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
        {**_TIED, "hidden_act": "relu", "rms_norm_eps": 1e-5},
    ),
}
