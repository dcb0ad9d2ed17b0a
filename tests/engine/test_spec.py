"""ModelSpec: what is not supported is refused by name, before any weight is read."""

import pytest

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.rope import Rope

YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, r"model_type must be one of falcon, .*, smollm3, got 'bert'"),
        ({"model_type": None}, "model_type must be one of"),
        ({"hidden_act": "mish"}, "hidden_act must be one of silu, .*, got 'mish'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must .*'dynamic'"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "yarn with mscale is not supported"),
        ({"model_type": "mistral", "layer_types": ["chunked_attention"]}, "got chunked_attention"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before must be True"),
        (
            {"model_type": "opt", "word_embed_proj_dim": 32},
            "word_embed_proj_dim must be 64, got 32",
        ),
        ({"model_type": "falcon", "alibi": True}, "alibi must be False, got True"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "must be False, got True",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "must be False, got True"),
        (
            {"model_type": "mistral", "sliding_window": 9, "layer_types": ["full_attention"]},
            "the model's config has a wrong value: windows of 1 layers, not of 2",
        ),
        ({"hidden_size": None}, "the model's config has a wrong value"),
        ({"num_attention_heads": 0}, "the model's config has a wrong value"),
        ({"rope_scaling": "yes"}, "the model's config has a wrong value"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "the model's config lacks 'factor'"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        spec_from_config(LLAMA | change)


@pytest.mark.parametrize("field", [name for name in LLAMA if name != "max_position_embeddings"])
def test_a_missing_field_is_named(field: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != field}
    with pytest.raises(UnsupportedModel, match=field):
        spec_from_config(config)


def test_missing_fields_take_the_family_defaults() -> None:
    spec = spec_from_config(LLAMA)
    assert (spec.num_kv_heads, spec.head_dim) == (4, 16)
    assert spec.ropes == (Rope(dim=16, theta=10000.0),) * 2
    assert spec_from_config(LLAMA | {"model_type": "qwen2"}).qkv_bias
    assert spec_from_config(LLAMA | {"model_type": "falcon"}).num_kv_heads == 1
    assert spec_from_config(LLAMA | {"model_type": "smollm3"}).tied_embeddings


def test_old_and_new_names_of_rope_parameters_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}
    assert spec_from_config(LLAMA | old) == spec_from_config(LLAMA | new)


def test_old_and_new_configs_of_gemma3_mean_the_same() -> None:
    gemma = LLAMA | {"num_hidden_layers": 6, "sliding_window": 128, "query_pre_attn_scalar": 16}
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": linear,
        "sliding_window_pattern": 3,
    }
    new = {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, **linear},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    }
    spec = spec_from_config(gemma | old)
    assert spec == spec_from_config(gemma | new)
    assert spec.windows == (128, 128, None) * 2
    assert spec.ropes[0] == Rope(dim=16, theta=1e4)


def test_a_window_of_the_whole_context_is_none() -> None:
    mistral = LLAMA | {"model_type": "mistral"}
    assert spec_from_config(mistral | {"sliding_window": 511}).windows == (511, 511)
    assert spec_from_config(mistral | {"sliding_window": 512}).windows == (None, None)
    assert spec_from_config(mistral | {"sliding_window": None}).windows == (None, None)


def test_qwen_windows_only_where_they_are_switched_on() -> None:
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 64, "max_window_layers": 1}
    assert spec_from_config(qwen).windows == (None, None)
    assert spec_from_config(qwen | {"use_sliding_window": True}).windows == (None, 64)
