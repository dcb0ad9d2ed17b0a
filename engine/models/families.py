"""`FAMILIES`: how each family's config becomes a `ModelSpec`, and where its weights go.

A family is data for the one decoder: the fields of its spec that are not read alike for all, what
older configs leave out, and its weight map.
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
    read: Callable[[Config], Fields]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    weight_map: WeightMap = names.COMMON


#: Names that families have for the common fields of a config; none means two things.
_ALIASES = {
    "activation": "hidden_act",
    "activation_function": "hidden_act",
    "ffn_dim": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "hidden_activation": "hidden_act",
    "kv_channels": "head_dim",
    "layer_norm_eps": "rms_norm_eps",
    "layer_norm_epsilon": "rms_norm_eps",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "num_local_experts": "num_experts",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}


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
    own = {
        common: config[theirs]
        for theirs, common in _ALIASES.items()
        if config.get(theirs) is not None
    }
    config = {**family.defaults, **config, **own}
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
_GEMMA = {**_TIED, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA3 = {**_GEMMA, "rope_theta": 1e6, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA3_LARGE = {
    **_GEMMA3,
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
_CLASSIC = {"hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "intermediate_size": None}
_PHI = {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5}
_NEOX = {**_CLASSIC, "hidden_act": "gelu", "partial_rotary_factor": 0.25}

#: model_type in config.json -> the family.
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 1 to 3, SmolLM, SmolLM2, TinyLlama, Yi", fields.llama),
    "mistral": Family("Mistral", fields.mistral),
    "mixtral": Family("Mixtral", fields.mixtral, {"norm_topk_prob": True}),
    "qwen": Family("Qwen (first)", fields.qwen),
    "qwen2": Family("Qwen2, Qwen2.5, QwQ", fields.qwen2),
    "qwen2_moe": Family("Qwen1.5-MoE, Qwen2-MoE", fields.qwen2_moe, {"norm_topk_prob": False}),
    "qwen3": Family("Qwen3", fields.qwen3),
    "qwen3_moe": Family("Qwen3-MoE", fields.qwen3_moe, {"norm_topk_prob": False}),
    "olmo2": Family("OLMo 2", fields.olmo2, {}, names.POST_NORMS),
    "smollm3": Family("SmolLM3", fields.smollm3, {**_TIED, "rope_theta": 2e6}),
    "gemma": Family("Gemma", fields.gemma1, _GEMMA),
    "gemma2": Family("Gemma 2", fields.gemma2, _GEMMA, names.POST_NORMS),
    "gemma3_text": Family("Gemma 3 (270M, 1B)", fields.gemma3, _GEMMA3, names.POST_NORMS),
    "gemma3": Family(
        "Gemma 3 (4B and larger: the text alone)", fields.gemma3, _GEMMA3_LARGE, names.POST_NORMS
    ),
    "phi": Family("Phi-1, Phi-1.5, Phi-2", fields.phi, _PHI),
    "phi3": Family("Phi-3, Phi-3.5, Phi-4", fields.mistral),
    "falcon": Family(
        "Falcon 7B, 40B, 180B, 11B", fields.falcon, {**_CLASSIC, **_TIED, "hidden_act": "gelu"}
    ),
    "gpt2": Family("GPT-2", fields.gpt2, {**_CLASSIC, **_TIED}, names.TRANSPOSED),
    "gpt_neox": Family("GPT-NeoX, Pythia", fields.gpt_neox, _NEOX),
    "opt": Family("OPT (all but 350M)", fields.opt, {**_CLASSIC, **_TIED, "hidden_act": "relu"}),
}
