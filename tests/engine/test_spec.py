"""ModelSpec: what is not supported is refused by name, before any weight is read."""

import pytest

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.models.spec import spec_from_config

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
        ({"model_type": "bert"}, r"model_type must be one of llama, .*got 'bert'"),
        ({"model_type": None}, "model_type must be one of"),
        ({"hidden_act": "relu"}, "hidden_act must be 'silu', got 'relu'"),
        ({"attention_bias": True}, "biases"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type must be .*'yarn'"),
        ({"hidden_size": None}, "the model's config has a wrong value"),
        ({"num_attention_heads": 0}, "the model's config has a wrong value"),
        ({"rope_scaling": "yes"}, "the model's config has a wrong value"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "the model's config lacks 'factor'"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window must be off.*got 128"),
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
    assert (spec.num_kv_heads, spec.head_dim, spec.rope_theta) == (4, 16, 10000.0)
    assert spec_from_config(LLAMA | {"model_type": "qwen2"}).qkv_bias


def test_old_and_new_names_of_rope_parameters_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}
    assert spec_from_config(LLAMA | old) == spec_from_config(LLAMA | new)
