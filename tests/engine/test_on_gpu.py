"""The whole engine on a GPU, or with its kernels interpreted: the tokens of a CPU.

Needs no fixture of the engine's tests: `bench/gpu.sh` runs it where little is installed.
"""

import os
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from device_kernels import put_in_place
from tokenmill.engine import engine
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.mlp import MoE
from tokenmill.engine.models.weights import ModelWeights, empty_weights, pack, random_weights
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.kernels import cpu_ops, ops
from tokenmill.producer.params import SamplingParams

# Read when a kernel is defined, that is when its module is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

#: By request.
Tokens = dict[str, list[int]]
CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 16},
}
#: Greedy, drawn, and drawn with filters; the prompts are longer and shorter than a step.
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.9},
]
EDITS: list[dict[str, Any]] = [
    {"temperature": 0.9, "repetition_penalty": 1.7, "presence_penalty": 0.5},
    {"temperature": 0.0, "frequency_penalty": 1.5, "logit_bias": {4: 9.0, 8: 9.0}},
    {"temperature": 0.9, "min_tokens": 3, "stop_token_ids": tuple(range(60)), "logprobs": 1},
]
PROMPTS = [[5, 9, 31, 4, 77, 12, 60, 8, 8, 40, 41, 42, 3], [17, 2], [96, 1, 50, 51]]


def copy(source: ModelWeights, target: ModelWeights) -> None:
    target.embedding.copy_(source.embedding)
    for ours, theirs in zip(target.linears(), source.linears(), strict=True):
        ours.weight.copy_(theirs.weight)
    for norm, other in zip(target.norms(), source.norms(), strict=True):
        norm.weight.copy_(other.weight)


def make_model(family: str, device: torch.device, *, stacked: bool = False) -> LoadedModel:
    spec = spec_from_config(CONFIG | FAMILIES[family] | {"model_type": family})
    weights = empty_weights(spec, torch.float32, CPU)
    random_weights(weights, seed=3)
    if device != CPU:
        there = empty_weights(spec, torch.float32, device)
        copy(weights, there)
        weights = there
    for layer in weights.layers:
        if stacked and isinstance(layer.mlp, MoE):
            experts = layer.mlp.experts
            layer.mlp.stacks = (
                torch.stack([expert.up.weight for expert in experts]),
                torch.stack([expert.down.weight for expert in experts]),
            )
    backend = Backend(models.WordLevel({"w0": 0}, unk_token="w0"))
    tokenizer = Tokenizer(backend, eos_token_ids=[])
    return LoadedModel("random", spec, pack(weights), tokenizer, device, torch.float32)


def tokens(
    model: LoadedModel,
    samplings: list[dict[str, Any]] = SAMPLINGS,
    *,
    kv_cache_memory: int | None = 1 << 20,
    **mode: Any,
) -> Tokens:
    config = EngineConfig(
        token_budget=8, max_num_seqs=3, block_size=4, kv_cache_memory=kv_cache_memory, **mode
    )
    engine = Engine(model, config)
    for number, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True)):
        params = SamplingParams(max_tokens=4, ignore_eos=True, **sampling)
        engine.add(str(number), prompt, params, seed=number)
    found: dict[str, list[int]] = {str(number): [] for number in range(len(PROMPTS))}
    while engine.has_work:
        for output in engine.step():
            found[output.seq_id] += output.token_ids
    engine.check_integrity()
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_the_tokens_of_a_cpu(family: str) -> None:
    gpu = torch.device("cuda")
    assert tokens(make_model(family, gpu)) == tokens(make_model(family, CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mode",
    [
        {"async_scheduling": True},
        {"cuda_graphs": True},
        {"async_scheduling": True, "cuda_graphs": True},
    ],
    ids=["ahead", "graphs", "both"],
)
def test_a_gpu_that_is_not_waited_for_gives_the_same(family: str, mode: dict[str, Any]) -> None:
    """One step ahead and in graphs, which the second half of the steps replays."""
    model = make_model(family, torch.device("cuda"), stacked=True)
    assert tokens(model, **mode) == tokens(make_model(family, CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ahead", [False, True])
def test_a_gpu_changes_logits_as_a_cpu_does(ahead: bool) -> None:
    """Penalties, biases and ends that come too early, with and without waiting for each step."""
    mode: dict[str, Any] = {"async_scheduling": ahead, "cuda_graphs": ahead}
    found = tokens(make_model("qwen3", torch.device("cuda")), EDITS, **mode)
    assert found == tokens(make_model("qwen3", CPU), EDITS)


def sharp_model(device: torch.device) -> LoadedModel:
    """Its attention is to few keys, so that their last bits count."""
    model = make_model("qwen3", device)
    for layer in model.weights.layers:
        for norm in (layer.q_norm, layer.k_norm):
            if norm is not None:
                norm.weight.fill_(4.0)
    return model


def tokens_of_8_bit_keys(monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """Those of a CPU that rounds what is in its cache of float32."""
    store = ops.rope_store_kv

    def rounding(*given: torch.Tensor, **norms: Any) -> torch.Tensor:
        q = store(*given, **norms)
        for cache in given[-2:]:
            cache.copy_(cache.clamp(-448.0, 448.0).to(torch.float8_e4m3fn))
        return q

    with monkeypatch.context() as patched:
        patched.setattr(ops, "rope_store_kv", rounding)
        patched.setattr(cpu_ops, "has_programs", lambda _: False)  # which would not call that
        return tokens(sharp_model(CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ahead", [False, True])
def test_a_gpu_keeps_keys_and_values_in_8_bits(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode: dict[str, Any] = {"async_scheduling": ahead, "cuda_graphs": ahead}
    found = tokens(sharp_model(torch.device("cuda")), kv_cache_dtype="fp8", **mode)
    assert found == tokens_of_8_bit_keys(monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cache_takes_what_the_largest_step_leaves() -> None:
    """The largest step is run at the start, and measured."""
    model = make_model("qwen3", torch.device("cuda"))
    assert tokens(model, kv_cache_memory=None) == tokens(make_model("qwen3", CPU))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")
@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3", "gemma2"))]
)
def test_the_kernels_give_the_tokens_of_a_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the sampler, which has a test beside its kernel."""
    expected = tokens(make_model(family, CPU))
    put_in_place(monkeypatch)
    assert tokens(make_model(family, CPU, stacked=True)) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")
def test_the_kernels_keep_keys_and_values_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from exact_fp8 import convert_as_processors_do

    expected = tokens_of_8_bit_keys(monkeypatch)
    assert expected != tokens(sharp_model(CPU))
    put_in_place(monkeypatch)
    convert_as_processors_do(monkeypatch)
    monkeypatch.setattr(engine, "choose_kv_cache_dtype", lambda *_: torch.float8_e4m3fn)
    assert tokens(sharp_model(CPU)) == expected
