"""Nothing that is launched on a GPU makes the host wait for it, and everything it uses is there.

No GPU is needed (`fake_gpu.py`): whatever reads a number raises, copies between host and device are
watched, and kernels are not run. The tokens that an engine collects are made up.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from fake_gpu import drain, fake_engine, fake_gpu, fake_model, in_turns
from tokenmill.engine.config import EngineConfig
from tokenmill.producer.params import SamplingParams

CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
SIZE: dict[str, Any] = {
    "max_model_len": 96,
    "token_budget": 32,
    "max_num_seqs": 8,
    "block_size": 16,
    "kv_cache_memory": 1 << 20,
}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.9, "logprobs": 2},
    {"temperature": 0.9, "prompt_logprobs": 1},
]
#: In turns these copy what they change logits by, and wait.
EDITS: list[dict[str, Any]] = [
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logprobs": 1},
    {"temperature": 0.7, "logit_bias": {5: 2.0, 7: -3.0}},
    {"temperature": 0.7, "min_tokens": 4, "stop_token_ids": (3, 4), "logprobs": 0},
]


def requests_of(samplings: list[dict[str, Any]]) -> list[tuple[int, SamplingParams]]:
    """Their prompts' lengths, and what they ask for."""
    return [
        (11 + 7 * number, SamplingParams(max_tokens=9, ignore_eos=True, **sampling))
        for number, sampling in enumerate(samplings)
    ]


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with fake_gpu(lambda *_, **__: None) as mode:
        yield mode


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_a_launch_waits(mode: FakeTensorMode, family: str, graphs: bool) -> None:
    model = fake_model(mode, CONFIG | {"model_type": family} | FAMILIES[family])
    config = EngineConfig(async_scheduling=True, cuda_graphs=graphs, **SIZE)
    requests = requests_of(SAMPLINGS + EDITS)
    outputs = drain(fake_engine(mode, model, config), requests)
    assert not [output.error for output in outputs if output.error]
    assert sum(len(output.token_ids) for output in outputs) >= 8 * len(requests)


@pytest.mark.parametrize("graphs", [False, True])
def test_nothing_waits_where_it_is_deterministic(mode: FakeTensorMode, graphs: bool) -> None:
    """The check at the start aside, which reads bits."""
    model = fake_model(mode, CONFIG | {"model_type": "mixtral"} | FAMILIES["mixtral"])
    flags: dict[str, Any] = {"deterministic": True, "async_scheduling": True}
    config = EngineConfig(**flags, cuda_graphs=graphs, **SIZE)
    requests = requests_of(SAMPLINGS)
    outputs = drain(fake_engine(mode, model, config), requests)
    assert model.weights.has_fixed_tiles
    assert sum(len(output.token_ids) for output in outputs) == 9 * len(requests)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_turns_mix_no_devices(mode: FakeTensorMode, family: str) -> None:
    model = fake_model(mode, CONFIG | {"model_type": family} | FAMILIES[family])
    engine = fake_engine(mode, model, EngineConfig(**SIZE))
    with in_turns(mode, 97) as watch:
        drain(engine, requests_of(SAMPLINGS + EDITS))
    assert watch.num_operations > 100
