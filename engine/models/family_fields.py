"""The fields of a `ModelSpec` that the families read each in their own way from their configs.

Each family's function takes a config under the common names and returns what differs from a Llama
without biases; `families.py` says which family has which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.rope import Rope, read_rope
from tokenmill.engine.models.spec import MoESpec

Config = Mapping[str, Any]
Fields = dict[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation(config: Config) -> str:
    """Our name of the activation.

    Raises:
        UnsupportedModel: one that no supported family has.
    """
    kind = str(config.get("hidden_act", "silu"))
    if kind not in _ACTIVATIONS:
        raise UnsupportedModel(f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {kind!r}")
    return _ACTIVATIONS[kind]


def _refuse(config: Config, *wanted: tuple[str, object]) -> None:
    """Refuse any other value of a field; a field that is absent or null has the wanted one."""
    for name, value in wanted:
        if config.get(name) not in (None, value):
            raise UnsupportedModel(f"{name} must be {value!r}, got {config[name]!r}")


def rope(config: Config, layer_type: str = "") -> Rope:
    """Newer configs have `rope_parameters`, for some families by layer type; older two fields."""
    parameters: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return read_rope(config, parameters.get(layer_type, parameters), config["head_dim"])


def _layer_types(config: Config, otherwise: Sequence[bool]) -> list[bool]:
    """For each layer whether its attention has the window; `otherwise` where that is not said."""
    types = config.get("layer_types")
    if not types:
        return list(otherwise)
    known = {"sliding_attention": True, "full_attention": False}
    unknown = set(types) - set(known)
    if unknown:
        raise UnsupportedModel(
            f"layer_types must be of {', '.join(known)}, got {', '.join(map(str, unknown))}"
        )
    return [known[kind] for kind in types]


def _windows(config: Config, otherwise: Sequence[bool]) -> tuple[int | None, ...]:
    """A window of at least the context is none."""
    window = config.get("sliding_window")
    reach = int(config.get("max_position_embeddings", 2048))
    width = int(window) if window and int(window) < reach else None
    return tuple(width if slides else None for slides in _layer_types(config, otherwise))


def _numbers(config: Config) -> range:
    return range(int(config["num_hidden_layers"]))


def llama(config: Config) -> Fields:
    bias = bool(config.get("attention_bias", False))
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def mistral(config: Config) -> Fields:
    return {"windows": _windows(config, [True for _ in _numbers(config)])}


def mixtral(config: Config) -> Fields:
    return {**mistral(config), "moe": _moe(config, int(config["intermediate_size"]))}


def _moe(config: Config, inner: int) -> MoESpec:
    """Experts in every layer, or in every so many and not in those that are excepted."""
    every, excepted = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or ()
    return MoESpec(
        num_experts=int(config["num_experts"]),
        top_k=int(config["num_experts_per_tok"]),
        intermediate_size=inner,
        normalize=bool(config["norm_topk_prob"]),
        shared_intermediate_size=int(config.get("shared_expert_intermediate_size", 0)),
        layers=tuple(n not in excepted and (n + 1) % every == 0 for n in _numbers(config)),
    )


def qwen2(config: Config) -> Fields:
    from_layer = int(config.get("max_window_layers", 28))
    windows = _windows(config, [number >= from_layer for number in _numbers(config)])
    if not config.get("use_sliding_window"):
        windows = (None,) * len(windows)
    return {"qkv_bias": True, "windows": windows}


def qwen2_moe(config: Config) -> Fields:
    below = int(config.get("max_window_layers", 28))
    slides = [number % 2 == 0 and number < below for number in _numbers(config)]
    return {
        **qwen2({**config, "layer_types": config.get("layer_types") or _types(slides)}),
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "moe": _moe(config, int(config["moe_intermediate_size"])),
    }


def _types(slides: Sequence[bool]) -> list[str]:
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def qwen3(config: Config) -> Fields:
    bias = bool(config.get("attention_bias", False))
    return {**qwen2(config), "qkv_bias": bias, "out_bias": bias, "qk_norm": "head"}


def qwen3_moe(config: Config) -> Fields:
    return {
        **qwen3({**config, "layer_types": _types([True for _ in _numbers(config)])}),
        "moe": _moe(config, int(config["moe_intermediate_size"])),
    }


def qwen(config: Config) -> Fields:
    """The first Qwen: up to `seq_length`, beyond which it changes its positions as it goes."""
    return {
        "qkv_bias": True,
        "intermediate_size": int(config["intermediate_size"]) // 2,
        "max_position": min(int(config["seq_length"]), int(config["max_position_embeddings"])),
        "out_bias": not config.get("no_bias", True),
        "mlp_bias": not config.get("no_bias", True),
    }


def olmo2(config: Config) -> Fields:
    return {**llama(config), "pre_norm": False, "post_norm": True, "qk_norm": "whole"}


def smollm3(config: Config) -> Fields:
    every = int(config.get("no_rope_layer_interval", 4))
    turned = config.get("no_rope_layers") or [int((n + 1) % every != 0) for n in _numbers(config)]
    turning = rope(config)
    windows = _windows(config, [not turn for turn in turned])
    return {
        **llama(config),
        "ropes": tuple(turning if turn else None for turn in turned),
        "windows": windows if config.get("use_sliding_window") else (None,) * len(windows),
    }


def gemma(config: Config) -> Fields:
    _refuse(config, ("use_bidirectional_attention", False))
    return {
        **llama(config),
        "norm_offset": 1.0,
        "embedding_scale": int(config["hidden_size"]) ** 0.5,
    }


def gemma1(config: Config) -> Fields:
    return {**gemma(config), "activation": "gelu_tanh"}  # configs that say "gelu" mean it


def gemma2(config: Config) -> Fields:
    def cap(name: str) -> float | None:
        return None if config.get(name) is None else float(config[name])

    return {
        **gemma(config),
        "post_norm": True,
        "attention_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "attention_softcap": cap("attn_logit_softcapping"),
        "logit_softcap": cap("final_logit_softcapping"),
        "windows": _windows(config, [number % 2 == 0 for number in _numbers(config)]),
    }


def gemma3(config: Config) -> Fields:
    """Layers with the window turn by positions of their own, which are never stretched."""
    every = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    slides = _layer_types(config, [(number + 1) % every != 0 for number in _numbers(config)])
    local_theta = config.get("rope_local_base_freq", 10000.0)
    local = {**config, "rope_theta": local_theta, "rope_scaling": None}
    ropes = {True: rope(local, "sliding_attention"), False: rope(config, "full_attention")}
    return {
        **gemma2({**config, "layer_types": _types(slides)}),
        "qk_norm": "head",
        "ropes": tuple(ropes[slide] for slide in slides),
    }


def _classic(config: Config) -> Fields:
    """The families before Llama: layer norm, one linear before the activation, biases, no GQA."""
    return {
        "num_kv_heads": int(config["num_attention_heads"]),
        "layer_norm": True,
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    }


def gpt2(config: Config) -> Fields:
    _refuse(config, ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False))
    no_scale = {} if config.get("scale_attn_weights", True) else {"attention_scale": 1.0}
    nowhere = (None,) * len(_numbers(config))
    return {**_classic(config), **no_scale, "ropes": nowhere, "position_offset": 0}


def opt(config: Config) -> Fields:
    _refuse(
        config,
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
        ("word_embed_proj_dim", config["hidden_size"]),
    )
    bias = bool(config.get("enable_bias", True))
    return {
        **_classic(config),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "ropes": (None,) * len(_numbers(config)),
        "position_offset": 2,
    }


def falcon(config: Config) -> Fields:
    """The form of 7B (one KV head, one norm), of 40B (KV groups, two norms), and the serial one."""
    _refuse(config, ("alibi", False))
    is_new = bool(config.get("new_decoder_architecture"))
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_kv_heads") or heads)
    if not is_new:
        kv_heads = 1 if config.get("multi_query", True) else heads
    bias = bool(config.get("bias", False))
    return {
        **_classic(config),
        "num_kv_heads": kv_heads,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "parallel": is_new or bool(config.get("parallel_attn", True)),
        "shared_norm": (
            (config.get("num_ln_in_parallel_attn") or 2) == 1
            if is_new
            else bool(config.get("parallel_attn", True))
        ),
    }


def phi(config: Config) -> Fields:
    return {
        **_classic(config),
        "num_kv_heads": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "parallel": True,
        "shared_norm": True,
        "head_bias": True,
        "qk_norm": "head" if config.get("qk_layernorm") else "",
    }


def gpt_neox(config: Config) -> Fields:
    bias = bool(config.get("attention_bias", True))
    is_parallel = bool(config.get("use_parallel_residual", True))
    return {**_classic(config), "qkv_bias": bias, "out_bias": bias, "parallel": is_parallel}
