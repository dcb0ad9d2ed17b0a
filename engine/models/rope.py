"""`Rope`: rotary positions, plain, partial or scaled, and the table of cosines and sines.

RoPE: arXiv 2104.09864. Scalings: linear; Llama 3.1's; YaRN, arXiv 2309.00071; LongRoPE, arXiv
2402.13753.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokenmill.engine.errors import UnsupportedModel

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotation of the first `dim` channels of a head, half-split (NeoX) order."""

    dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    #: Positions that the model was trained on before its context was stretched.
    original_max_position: int = 0
    #: llama3: turns below the first are stretched, above the second kept. yarn: the reverse names.
    low_turns: float = 1.0
    high_turns: float = 4.0
    #: yarn: whether the bounds of the ramp are rounded to whole channels.
    truncate: bool = True
    #: longrope: a factor per channel pair, for short and for long contexts.
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    #: Cosines and sines are multiplied by it.
    attention_factor: float = 1.0


def read_rope(config: Mapping[str, Any], parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """Read the rotary fields: `parameters` has them in newer configs, `config` in older ones.

    Raises:
        UnsupportedModel: a kind of scaling that is not known.
    """
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    kind = "longrope" if kind == "su" else kind  # its first name
    share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    rope = Rope(dim=int(head_dim * share), theta=theta)
    if kind == "default":
        return rope
    if kind not in KINDS:
        raise UnsupportedModel(f"rope_type must be one of {', '.join(KINDS)}, got {kind!r}")
    reach = int(config.get("max_position_embeddings", 0))
    original = int(
        parameters.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings", reach)
    )
    rope = replace(rope, kind=kind, original_max_position=original)
    if kind == "longrope":
        factor = float(parameters.get("factor") or reach / original)
        return replace(
            rope,
            factor=factor,
            short_factors=tuple(map(float, parameters["short_factor"])),
            long_factors=tuple(map(float, parameters["long_factor"])),
            attention_factor=_given(parameters, _longrope_attention_factor(factor, original)),
        )
    factor = float(parameters["factor"])
    if kind == "linear":
        return replace(rope, factor=factor)
    if kind == "llama3":
        return replace(
            rope,
            factor=factor,
            low_turns=float(parameters["low_freq_factor"]),
            high_turns=float(parameters["high_freq_factor"]),
        )
    if parameters.get("mscale") or parameters.get("mscale_all_dim"):
        raise UnsupportedModel("rope_type yarn with mscale is not supported; choose another model")
    return replace(
        rope,
        factor=factor,
        low_turns=float(parameters.get("beta_slow") or 1.0),
        high_turns=float(parameters.get("beta_fast") or 32.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=_given(parameters, 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0),
    )


def _given(parameters: Mapping[str, Any], otherwise: float) -> float:
    given = parameters.get("attention_factor")
    return otherwise if given is None else float(given)


def _longrope_attention_factor(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def inverse_frequencies(rope: Rope, max_model_len: int) -> list[float]:
    """Rotation per position of each of dim / 2 channel pairs, in radians.

    LongRoPE has two sets: the long one serves every sequence as soon as the context that the
    engine is started with is longer than the original one (docs/models.md).
    """
    half = rope.dim // 2
    plain = [rope.theta ** (-i / half) for i in range(half)]
    if rope.kind == "linear":
        return [f / rope.factor for f in plain]
    if rope.kind == "llama3":
        return [_llama3(f, rope) for f in plain]
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    if rope.kind == "longrope":
        is_long = max_model_len > rope.original_max_position
        factors = rope.long_factors if is_long else rope.short_factors
        return [f / factor for f, factor in zip(plain, factors, strict=True)]
    return plain


def _llama3(frequency: float, rope: Rope) -> float:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = rope.original_max_position * frequency / (2 * math.pi)
    if turns < rope.low_turns:
        return frequency / rope.factor
    if turns > rope.high_turns:
        return frequency
    share = (turns - rope.low_turns) / (rope.high_turns - rope.low_turns)
    return (1 - share) * frequency / rope.factor + share * frequency


def _yarn(plain: list[float], rope: Rope) -> list[float]:
    """As `_llama3`, but the share falls along the channels instead of the turns."""

    def channel(turns: float) -> float:
        wavelength = rope.original_max_position / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = channel(rope.high_turns), channel(rope.low_turns)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001
    shares = [1 - min(max((i - low) / width, 0), 1) for i in range(len(plain))]
    return [(1 - s) * f / rope.factor + s * f for s, f in zip(shares, plain, strict=True)]


def rotary_table(rope: Rope | None, max_model_len: int) -> torch.Tensor:
    """Cosines and sines of every position: [max_model_len, dim] float32, cosines first.

    Without a rope it has no columns: nothing is turned.
    """
    if rope is None:
        return torch.empty(max_model_len, 0)
    frequencies = torch.tensor(inverse_frequencies(rope, max_model_len), dtype=torch.float64)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float64), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).mul_(rope.attention_factor).float()
