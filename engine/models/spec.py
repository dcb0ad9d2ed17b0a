"""`ModelSpec`: what distinguishes the models that the one ragged decoder runs.

Filled from a Hugging Face `config.json`, or from GGUF metadata brought to the same names.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenmill.engine.errors import UnsupportedModel

#: model_type in config.json -> the family's own switches.
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency scaling; `kind` "linear" uses `factor` alone, "default" nothing."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and switches of a decoder; sizes in elements."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tied_embeddings: bool
    qkv_bias: bool = False
    #: RMSNorm of every query and key head before the rotation (Qwen3).
    qk_norm: bool = False

    @property
    def kv_token_elements(self) -> int:
        """Elements of keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
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


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    family = str(config.get("model_type", "?"))
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model_type must be one of {', '.join(sorted(FAMILIES))}, got {family!r}; "
            "choose a model of a supported family"
        )
    switches = FAMILIES[family]
    _refuse_unsupported(config, family)
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    return ModelSpec(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        max_position=int(config.get("max_position_embeddings", 2048)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(config),
        rope_scaling=_rope_scaling(config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=switches.get("qkv_bias", bool(config.get("attention_bias", False))),
        qk_norm=switches.get("qk_norm", False),
    )


def _refuse_unsupported(config: Mapping[str, Any], family: str) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act must be 'silu', got {config['hidden_act']!r}")
    if config.get("mlp_bias") or (family == "llama" and config.get("attention_bias")):
        raise UnsupportedModel("a Llama with biases is not supported; choose one without")
    window = config.get("sliding_window")
    windowed = family == "mistral" or bool(config.get("use_sliding_window"))
    if windowed and window and window < int(config.get("max_position_embeddings", 0)):
        raise UnsupportedModel(
            f"sliding_window must be off or at least the context, got {window}; "
            "choose a model without a sliding window"
        )


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Newer configs have `rope_parameters`; older ones `rope_theta` and `rope_scaling`."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_theta(config: Mapping[str, Any]) -> float:
    return float(_rope_parameters(config).get("rope_theta", config.get("rope_theta", 10000.0)))


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling:
    scaling = _rope_parameters(config)
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModel(f"rope_type must be default, linear or llama3, got {kind!r}")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind=kind, factor=float(scaling["factor"]))
    return RopeScaling(
        kind=kind,
        factor=float(scaling["factor"]),
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_position=int(scaling["original_max_position_embeddings"]),
    )


def inverse_frequencies(spec: ModelSpec) -> list[float]:
    """Rotation per position of each of head_dim / 2 pairs, in radians (RoPE, arXiv 2104.09864)."""
    half = spec.head_dim // 2
    plain = [spec.rope_theta ** (-i / half) for i in range(half)]
    scaling = spec.rope_scaling
    if scaling.kind == "default":
        return plain
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain]
    return [_llama3_frequency(f, scaling) for f in plain]


def _llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_max_position / wavelength
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - share) * frequency / scaling.factor + share * frequency
