"""On a GPU, or with its kernels interpreted: with `deterministic` the logits of a request have the
same bits whatever it is computed with, and how.

Needs no fixture of the engine's tests: `bench/gpu.sh` runs it where little is installed.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

import host_kernels
from tokenmill.engine import engine as engine_module
from tokenmill.engine import executor as executor_module
from tokenmill.engine import step_graphs
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.deterministic import fix_tiles
from tokenmill.engine.engine import Engine
from tokenmill.engine.group import Alone
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.low_rank import Adapter, LowRank
from tokenmill.engine.models.mlp import MoE
from tokenmill.engine.models.packed_linear import IntPacking
from tokenmill.engine.models.quantization import FP8, Packing
from tokenmill.engine.models.shard import Shard
from tokenmill.engine.models.weights import ModelWeights, empty_weights, pack, random_weights
from tokenmill.engine.probe import Probe
from tokenmill.engine.sampler import sample
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.kernels import ops
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

# Read when a kernel is defined, that is when its module is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

#: (seed, length of the sequence) -> the logits that its next token was chosen from.
Logits = dict[tuple[int, int], torch.Tensor]
CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2_moe": MIXTURE | SHARED,
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 16},
    "gpt_neox": {"num_key_value_heads": 4},
}
MODES: dict[str, dict[str, Any]] = {
    "turns": {},
    "ahead": {"async_scheduling": True},
    "graphs": {"async_scheduling": True, "cuda_graphs": True},
}


def make_model(
    family: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    packing: Packing | None = None,
    **overrides: Any,
) -> LoadedModel:
    """Random, as a GPU holds it: linears plain or in few bits, experts stacked."""
    config = CONFIG | FAMILIES[family] | {"model_type": family} | overrides
    spec = spec_from_config(config)
    weights = empty_weights(spec, dtype, device, packing=packing)
    if packing is None:
        random_weights(weights, seed=3)
    else:
        fill_packed(weights)
    if packing is None and device == CPU:
        stack(weights)
    else:
        pack(weights)
    backend = Backend(models.WordLevel({"w0": 0}, unk_token="w0"))
    return LoadedModel("random", spec, weights, Tokenizer(backend, eos_token_ids=[]), device, dtype)


def fill_packed(weights: ModelWeights) -> None:
    """As `random_weights`, of codes."""
    generator = torch.Generator(weights.embedding.device).manual_seed(3)
    weights.embedding.normal_(generator=generator)
    for linear in weights.linears():
        for name, part in linear.parts().items():
            if name == "words":
                part.random_(-(2**31), 2**31 - 1, generator=generator)
            elif name == "zeros":
                part.fill_(8)
            else:
                scale = 0.1 if name == "weight" else 0.02
                part.uniform_(0.5 * scale, scale, generator=generator)
    for norm in weights.norms():
        norm.weight.fill_(1.0)


def stack(weights: ModelWeights) -> None:
    """What the loader does on a GPU."""
    for layer in weights.layers:
        if isinstance(layer.mlp, MoE):
            experts = layer.mlp.experts
            layer.mlp.stacks = (
                torch.stack([expert.up.weight for expert in experts]),
                torch.stack([expert.down.weight for expert in experts]),
            )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Logits:
    """Filled by every engine that steps; logits that differ from earlier ones fail the test."""
    from tokenmill.kernels import sampling

    logits: Logits = {}
    on_device: Callable[..., Any] = sampling.sample
    if not torch.cuda.is_available():
        on_device = host_kernels.sample

    def look(found: torch.Tensor, keys: list[tuple[int, int]]) -> None:
        for row, key in zip(found.float().clone(), keys, strict=True):
            assert torch.equal(row, logits.setdefault(key, row)), f"{key}: other logits"

    def of_host(found: torch.Tensor, seqs: list[Any], *rest: Any) -> Any:
        look(found, [(seq.seed, seq.num_tokens) for seq in seqs])
        return sample(found, seqs, *rest)

    def of_device(found: torch.Tensor, *, rows: Any = None, **columns: Any) -> Any:
        if rows is not None:  # not of the sampler of the host, which has been looked at
            seeds = columns["seeds"][rows.long()].tolist()
            look(found, list(zip(seeds, columns["positions"].tolist(), strict=True)))
            columns["rows"] = rows
        return on_device(found, **columns)

    monkeypatch.setattr(executor_module, "sample", of_host)
    monkeypatch.setattr(sampling, "sample", of_device)
    return logits


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU computes by those kernels of a GPU whose rows share a tile."""
    from tokenmill.kernels import batch_rows, dequant_gemm, fixed_linear

    def attend(*tensors: torch.Tensor, fixed_tiles: bool, **arguments: Any) -> torch.Tensor:
        assert fixed_tiles, "numpy's sums are so short that their bits do not tell"
        return ops._attention_on_gpu(*tensors, fixed_tiles=True, **arguments)

    monkeypatch.setattr(ops, "paged_attention", attend)
    monkeypatch.setattr(ops, "fixed_linear", fixed_linear.fixed_linear)
    monkeypatch.setattr(ops, "dequant_linear", dequant_gemm.dequant_linear)
    monkeypatch.setattr(batch_rows, "build_step", host_kernels.build_step)
    monkeypatch.setattr(batch_rows, "advance", host_kernels.advance)
    monkeypatch.setattr(step_graphs, "TOKEN_MULTIPLE", 16)


def token_of(number: int, position: int) -> int:
    return (31 * number + 37 * position) % 64


def answer(
    model: LoadedModel,
    lengths: list[int],
    *,
    first: int = 0,
    repeat: int = 1,
    num_outputs: int = 4,
    adapter: str = "",
    written: tuple[int, ...] = (),
    **config: Any,
) -> Engine:
    """Answer prompts of those lengths, numbered; again as often, when their blocks are known.

    `written`: what the first of them has for an answer already, from elsewhere.
    """
    defaults: dict[str, Any] = {"max_num_seqs": 6, "block_size": 4, "kv_cache_memory": 1 << 22}
    engine = Engine(model, EngineConfig(**(defaults | {"deterministic": True} | config)))
    engine.scheduler.output_lengths.record(1)  # admit all at once
    for turn in range(repeat):
        for number, length in enumerate(lengths, first):
            prompt = [token_of(number, n) for n in range(length)]
            asked = adapter if number % 2 == 0 else ""
            params = SamplingParams(
                max_tokens=num_outputs, temperature=0.5, ignore_eos=True, adapter=asked
            )
            begun = written if number == first else ()
            engine.add(f"{number}.{turn}", prompt, params, output_ids=begun, seed=number)
        while engine.has_work:
            engine.step()
    engine.check_integrity()
    return engine


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")
@pytest.mark.usefixtures("_kernels")
# Sequences that the check at the start puts beside others read a cache that nobody has filled.
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide by zero")
@pytest.mark.parametrize(
    "family",
    ["qwen3", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "qwen3")],
)
def test_kernels_alone_in_a_batch_in_chunks_and_cached(family: str, seen: Logits) -> None:
    """The check at the start is run once, as it takes as long as a request."""
    few: dict[str, Any] = {
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "num_attention_heads": 2,
    }
    model = make_model(family, CPU, **few, num_key_value_heads=2 if family == "gpt_neox" else 1)
    model.weights.fix_tiles()  # as on a GPU
    answer(model, [17], token_budget=24, max_model_len=24)
    settings: dict[str, Any] = {"deterministic": False, "max_model_len": 24}
    cached = answer(model, [17, 6], token_budget=7, repeat=2, **settings)
    assert cached.stats().num_cached_tokens > 0
    answer(model, [17, 6, 1], token_budget=12, max_num_seqs=3, **MODES["graphs"], **settings)
    assert {key for key in seen if key[1] >= 17} >= {(0, n) for n in range(17, 21)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in FAMILIES),
        ("qwen3", torch.float16),
        ("qwen3", torch.float32),
    ],
    ids=str,
)
def test_alone_in_a_batch_in_chunks_and_cached(
    family: str, dtype: torch.dtype, seen: Logits
) -> None:
    compare(make_model(family, torch.device("cuda"), dtype), seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [4, 8])
def test_linears_of_few_bits(bits: int, seen: Logits) -> None:
    packing = IntPacking(bits, 32)
    compare(make_model("qwen3", torch.device("cuda"), torch.bfloat16, packing), seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_widths_of_a_real_model(seen: Logits) -> None:
    """Whose linears have tiles of all kinds."""
    widths = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    heads = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000}
    gpu = torch.device("cuda")
    model = make_model("qwen3", gpu, torch.bfloat16, None, **widths, **heads)
    compare(model, seen, kv_cache_memory=1 << 28)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_beside_adapters(seen: Logits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every other request, which has other logits than without."""
    model = make_model("qwen3", torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(engine_module, "load_adapters", lambda *_: {"a": random_adapter(model)})
    compare(model, seen, adapter="a")


def compare(model: LoadedModel, seen: Logits, **settings: Any) -> None:
    """Answer the same requests in all kinds of batches, in turns, ahead and in graphs."""
    settings = {"kv_cache_memory": 1 << 22, "max_model_len": 640} | settings
    lengths = [530, 270, 130, 70, 33, 1]
    answer(model, lengths[:1], token_budget=600, **settings)
    for mode in MODES.values():
        answer(model, lengths, token_budget=1200, repeat=2, **mode, **settings)
        answer(model, lengths, token_budget=61, **mode, **settings)
    token_bytes = model.spec.kv_token_elements * model.dtype.itemsize
    few: dict[str, Any] = {"token_budget": 600, "first": 300, "num_outputs": 24}
    few |= settings | {"max_model_len": 240}
    answer(model, [200, *[100] * 5], **few)
    few["kv_cache_memory"] = 4 * 190 * token_bytes  # for the prompts, and for each two blocks more
    small = answer(model, [200, *[100] * 5], **few)
    assert small.stats().num_preemptions > 0
    answer(model, [402], token_budget=1200, first=200, **settings)
    written = tuple(token_of(200, n) for n in (400, 401))
    answer(model, [400, 33], token_budget=1200, first=200, written=written, **settings)
    many: dict[str, Any] = {"token_budget": 300, "max_num_seqs": 150, "first": 10}
    answer(model, [2, 1] * 75, **many, **MODES["graphs"], **settings)
    answer(model, [2, 1, 2], **(many | {"max_num_seqs": 1}), **settings)
    assert {(0, n) for n in range(530, 534)} <= seen.keys()


def random_adapter(model: LoadedModel) -> Adapter:
    generator = torch.Generator(model.device).manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        matrix = torch.randn(*shape, generator=generator, device=model.device)
        return (matrix * 0.1).to(model.dtype)

    width = model.spec.hidden_size
    return {
        layer.qkv: LowRank(random(8, width), random(model.spec.q_size + 2 * model.spec.kv_size, 8))
        for layer in model.weights.layers
    }


class Halves(Alone):
    """One of two ranks."""

    shard = Shard(0, 2)


def on_a_gpu(family: str) -> LoadedModel:
    """As far as is asked at the start: no tensor is there."""
    return replace(make_model(family, CPU), device=torch.device("cuda"))


def test_what_has_no_such_form_is_refused() -> None:
    half = replace(on_a_gpu("qwen3"), group=Halves())
    mixture, fp8 = on_a_gpu("mixtral"), on_a_gpu("qwen3")
    mlp = mixture.weights.layers[0].mlp
    assert isinstance(mlp, MoE)
    mlp.stacks = None
    fp8.weights.layers[1].attention_out.pack(FP8)
    for model, why in (
        (half, "where a model is divided among ranks"),
        (mixture, "where experts are computed one by one"),
        (fp8, "where linears are computed in fp8"),
    ):
        with pytest.raises(InvalidRequest, match=f"deterministic must be left out on a GPU {why}"):
            fix_tiles(model, [], is_asked=True)
        fix_tiles(model, [], is_asked=False)
        assert not model.weights.has_fixed_tiles


def test_an_engine_of_the_same_model_may_be_fast_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of it, and its adapters."""
    model, calls = on_a_gpu("mixtral"), list[int]()

    def multiply(x: torch.Tensor, w: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return x @ w.T

    adapter = random_adapter(replace(model, device=CPU))
    monkeypatch.setattr(ops, "fixed_linear", multiply)
    x = torch.ones(2, model.spec.hidden_size)
    for is_asked, expected in ((True, 2 + len(model.weights.layers)), (False, 0)):
        fix_tiles(model, [adapter], is_asked=is_asked)
        for layer in model.weights.layers:
            assert isinstance(layer.mlp, MoE)
            assert layer.mlp.has_fixed_tiles == is_asked
            layer.mlp.router(x)
        model.weights.lm_head(x)
        model.weights.layers[0].qkv(x)
        assert len(calls) == expected
        assert model.weights.has_fixed_tiles == is_asked
        calls.clear()


def test_experts_and_linears_of_few_bits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmill.kernels import moe

    told: list[bool] = []

    def grouped(x: torch.Tensor, w: torch.Tensor, *_: Any, fixed_tiles: bool) -> torch.Tensor:
        told.append(fixed_tiles)
        return x.new_zeros(4, w.shape[1])

    def dequant(x: torch.Tensor, *_: Any, fixed_tiles: bool, **__: Any) -> torch.Tensor:
        told.append(fixed_tiles)
        return x

    monkeypatch.setattr(moe, "grouped_linear", grouped)
    monkeypatch.setattr(ops, "dequant_linear", dequant)
    mixture = on_a_gpu("mixtral")
    packed = replace(make_model("qwen3", CPU, packing=IntPacking(4, 32)), device=mixture.device)
    x = torch.ones(2, mixture.spec.hidden_size)
    for is_asked in (True, False):
        for model in (mixture, packed):
            fix_tiles(model, [], is_asked=is_asked)
        mixture.weights.layers[0].mlp(x)
        packed.weights.layers[0].qkv(x)
        assert told == [is_asked] * 3
        told.clear()


def test_what_is_compared_at_the_start_fits_the_engine() -> None:
    """Of all sizes that a step may have, and no larger: in blocks, tokens and sequences."""
    model = make_model("qwen3", CPU)
    config = EngineConfig(token_budget=80, max_num_seqs=20, block_size=4, max_model_len=50)
    probe = Probe(Engine(model, config)._runner)
    assert [[n for _, n in crowd] for crowd in probe.crowds(50, 80, 20)] == [
        [1] * 14,
        [14],
        [50, 13],
        [50, 14],
        [50, 29],
    ]
    few = Engine(model, replace(config, kv_cache_memory=20 * 4 * 4 * model.spec.kv_token_elements))
    assert [[n for _, n in crowd] for crowd in Probe(few._runner).crowds(50, 80, 20)] == [[14]]


def test_a_cpu_is_left_as_it_is() -> None:
    model = make_model("qwen3", CPU)
    fix_tiles(model, [], is_asked=True)
    assert not model.weights.has_fixed_tiles
