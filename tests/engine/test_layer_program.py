"""A model whose layers are one program computes the same bits as part by part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.batch import RaggedBatch
from tokenmill.engine.group import ALONE
from tokenmill.engine.kv_cache import KVCache, allocate_kv_cache
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.models import decoder
from tokenmill.engine.models.decoder import Decoder
from tokenmill.engine.models.layer_program import LayerProgram
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.low_rank import Adapter, LowRank
from tokenmill.kernels import compiler, cpu_ops

pytestmark = pytest.mark.skipif(
    not compiler.has_wide_vectors(), reason="this processor has no AVX-512"
)
needs_byte_products = pytest.mark.skipif(
    not compiler.has_byte_products(), reason="this processor has no AVX-512 VNNI"
)
INT8 = pytest.param("int8", marks=needs_byte_products)
TinyCheckpoint = Callable[..., tuple[Path, Any]]
BLOCK, BLOCKS = 4, 64
LLAMA = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 128,
}  # fmt: skip


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llama", "mistral", "qwen2"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> LoadedModel:
    """Plain, with a window, and with biases."""
    window = {"sliding_window": 9} if request.param == "mistral" else {}
    return load(str(tiny_checkpoint(request.param, **LLAMA, **window)[0]), device="cpu")


def cache_of(model: LoadedModel, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = allocate_kv_cache(
        model.spec, BLOCKS, block_size=block, dtype=dtype, device=torch.device("cpu")
    )
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    return cache


def batch_of(*chunks: tuple[int, int], block: int = BLOCK) -> RaggedBatch:
    """(start, length) of sequences that each have a sixth of the cache."""
    each = BLOCKS // 6
    positions = [p for start, length in chunks for p in range(start, start + length)]
    blocks = [[n * each + b for b in range(each)] for n in range(len(chunks))]
    of_position = [n for n, (_, length) in enumerate(chunks) for _ in range(length)]
    slots = [n * each * block + p for n, p in zip(of_position, positions, strict=True)]
    starts = [0]
    for _, length in chunks:
        starts.append(starts[-1] + length)
    return RaggedBatch(
        input_ids=torch.tensor([5 + (31 * n + 37 * s) % 300 for n, s in enumerate(slots)]),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([s + n for s, n in chunks], dtype=torch.int32),
        block_tables=torch.tensor(blocks, dtype=torch.int32),
        logits_indices=torch.arange(starts[-1]),
        max_query_len=max(length for _, length in chunks),
    )


#: Decodes, prompts, both; more rows than there is memory for at first, and few again.
STEPS = [
    [(0, 5)],
    [(5, 1)],
    [(6, 20), (0, 1), (0, 3)],
    [(26, 1), (1, 1), (3, 1)],
    [(27, 10), (2, 30), (4, 33), (0, 40)],
    [(37, 1), (32, 2)],
]


@torch.inference_mode()
def outputs(
    model: LoadedModel, block: int = BLOCK, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    cache = cache_of(model, block, dtype)
    run = Decoder(model.spec, model.weights, 128, ALONE)
    return [run.logits(run.forward(batch_of(*chunks, block=block), cache)) for chunks in STEPS]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each cache that a decoder met has got a program."""
    seen: list[bool] = []
    make = decoder.Decoder._new_program

    def spy(self: Decoder, cache: KVCache) -> Any:
        made = make(self, cache)
        seen.append(made is not None)
        return made

    monkeypatch.setattr(decoder.Decoder, "_new_program", spy)
    return seen


def test_the_bits_of_a_step(
    model: LoadedModel, programs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = outputs(model)
    monkeypatch.setattr(cpu_ops, "has_programs", lambda _weight: False)
    apart = outputs(model)
    assert programs == [True, False]
    assert all(torch.equal(*both) for both in zip(together, apart, strict=True))
    assert not any(logits.isnan().any() for logits in together)


@needs_byte_products
def test_the_bits_of_int8(
    tiny_checkpoint: TinyCheckpoint, programs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(tiny_checkpoint("llama", **LLAMA)[0]), device="cpu", quantization="int8")
    together = outputs(model)
    monkeypatch.setattr(cpu_ops, "has_programs", lambda _weight: False)
    assert all(torch.equal(*both) for both in zip(together, outputs(model), strict=True))
    assert programs == [True, False]


@pytest.mark.parametrize("quantization", ["none", INT8])
def test_the_bits_of_a_cache_of_bfloat16(
    quantization: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 16, as a worker has them: each step is one program, or none is."""
    path = str(tiny_checkpoint("llama", **LLAMA)[0])
    model = load(path, device="cpu", quantization=quantization)
    rows: list[int] = []
    run = LayerProgram.run

    def counted(self: LayerProgram, batch: RaggedBatch, embedded: torch.Tensor) -> Any:
        rows.append(len(embedded))
        return run(self, batch, embedded)

    monkeypatch.setattr(LayerProgram, "run", counted)
    together = outputs(model, 16, torch.bfloat16)
    assert rows == [sum(length for _, length in chunks) for chunks in STEPS]
    monkeypatch.setattr(cpu_ops, "has_programs", lambda _weight: False)
    apart = outputs(model, 16, torch.bfloat16)
    assert len(rows) == len(STEPS)
    assert all(torch.equal(*both) for both in zip(together, apart, strict=True))
    assert not any(logits.isnan().any() for logits in together)
    assert not torch.equal(together[-1], outputs(model, 16)[-1]), "the cache is not of bfloat16"


def adapters_of(model: LoadedModel) -> list[Adapter]:
    """One of every linear, and one of a few, of other ranks."""
    generator = torch.Generator().manual_seed(1)

    def pair(inputs: int, outputs: int, ranks: int) -> LowRank:
        shapes = (ranks, inputs), (outputs, ranks)
        return LowRank(*(0.2 * torch.randn(shape, generator=generator) for shape in shapes))

    spec = model.spec
    qkv, inner = spec.q_size + 2 * spec.kv_size, spec.intermediate_size
    whole: dict[Linear, LowRank] = {}
    part: dict[Linear, LowRank] = {}
    for layer in model.weights.layers:
        mlp: Any = layer.mlp
        whole |= {
            layer.qkv: pair(spec.hidden_size, qkv, 12),
            layer.attention_out: pair(spec.q_size, spec.hidden_size, 4),
            mlp.up: pair(spec.hidden_size, 2 * inner, 8),
            mlp.down: pair(inner, spec.hidden_size, 4),
        }
        part[layer.qkv] = pair(spec.hidden_size, qkv, 40)
    return [whole, part]


def adapted_of(
    chunks: Sequence[tuple[int, int]], adapters: Sequence[Adapter]
) -> list[tuple[Adapter, torch.Tensor]]:
    """Every third sequence, from the first on, has the first adapter; the next ones the second."""
    rows: list[list[int]] = [[] for _ in (*adapters, None)]
    first = 0
    for number, (_, length) in enumerate(chunks):
        rows[number % len(rows)] += range(first, first + length)
        first += length
    pairs = zip(adapters, rows, strict=False)
    return [(adapter, torch.tensor(of_it)) for adapter, of_it in pairs if of_it]


@pytest.mark.parametrize("quantization", ["none", INT8])
@torch.inference_mode()
def test_the_bits_of_adapters(
    quantization: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one program, part by part, and of wanted rows alone; steps without adapters between."""
    path = str(tiny_checkpoint("llama", **LLAMA)[0])
    model = load(path, device="cpu", quantization=quantization)
    adapters = adapters_of(model)
    steps = [(chunks, n != 1) for n, chunks in enumerate(STEPS)]

    def computed(last_alone: bool) -> list[torch.Tensor]:
        cache, found = cache_of(model), []
        run = Decoder(model.spec, model.weights, 128, ALONE)
        for chunks, is_adapted in steps:
            batch = batch_of(*chunks)
            if last_alone:
                batch = replace(batch, logits_indices=batch.cu_seqlens_q[1:].long() - 1)
            if is_adapted:
                batch = replace(batch, adapted=adapted_of(chunks, adapters))
            found.append(run.logits(run.forward(batch, cache)))
        return found

    together, wanted = computed(last_alone=False), computed(last_alone=True)
    plain = outputs(model)
    with monkeypatch.context() as patched:
        patched.setattr(cpu_ops, "has_programs", lambda _weight: False)
        apart = computed(last_alone=False)
    assert all(torch.equal(*both) for both in zip(together, apart, strict=True))
    for (chunks, _), every, last in zip(steps, together, wanted, strict=True):
        ends = torch.tensor([length for _, length in chunks]).cumsum(0) - 1
        assert torch.equal(every[ends], last)
    differ = [not torch.equal(*both) for both in zip(together, plain, strict=True)]
    assert all(differ), "adapters that do nothing prove nothing"


@torch.inference_mode()
def test_a_step_with_adapters_is_one_program(model: LoadedModel, programs: list[bool]) -> None:
    run, cache = Decoder(model.spec, model.weights, 128, ALONE), cache_of(model)
    chunks = [(0, 5), (0, 3), (0, 2), (0, 9)]
    plain, adapters = batch_of(*chunks), adapters_of(model)
    batch = replace(plain, adapted=adapted_of(chunks, adapters))
    run.forward(batch, cache)
    assert programs == [True]
    program = run._program_for(cache)
    assert program is not None
    assert program.part_shares()["adapters"] > 0
    run.forward(plain, cache)
    assert "adapters" not in program.part_shares()


@torch.inference_mode()
def test_slots_that_the_cache_lacks(model: LoadedModel) -> None:
    run, batch = Decoder(model.spec, model.weights, 128, ALONE), batch_of((0, 3))
    batch.slot_mapping[1] = BLOCK * BLOCKS
    with pytest.raises(IndexError, match=f"slots at most {BLOCK * BLOCKS - 1}, got others in 1 of"):
        run.forward(batch, cache_of(model))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("qwen3", LLAMA), ("gemma2", LLAMA), ("gpt_neox", {}), ("llama", {"hidden_size": 96})],
)
def test_models_that_have_none(
    family: str, overrides: dict[str, Any], tiny_checkpoint: TinyCheckpoint, programs: list[bool]
) -> None:
    """Norms of heads, norms of outputs, layer norms, and widths that no kernel takes."""
    outputs(load(str(tiny_checkpoint(family, **overrides)[0]), device="cpu"))
    assert programs == [False]


@torch.inference_mode()
def test_interrupted_while_it_grows(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there goes on: addresses and the memory that they name change together."""
    run, cache = Decoder(model.spec, model.weights, 128, ALONE), cache_of(model)
    before = run.forward(batch_of((0, 5)), cache)

    def interrupted(_calls: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tokenmill.engine.models.layer_program.Program", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.forward(batch_of((0, 40), (0, 40)), cache)
    assert torch.equal(run.forward(batch_of((0, 5)), cache), before)
    assert len(run.forward(batch_of((0, 40), (0, 40)), cache)) == 80


@torch.inference_mode()
@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        ([(0, 9)], []),  # a part of a prompt
        ([(0, 9), (0, 1), (0, 30)], [8, 9]),  # the last is a part
        ([(0, 9), (0, 1), (0, 30)], [8, 9, 39]),
        ([(0, 9), (0, 30)], [38, 3]),  # of one sequence two, as with its log probabilities
        ([(0, 9), (0, 30)], [8, 38, 0, 1, 20]),  # more than sequences
        ([(0, 1), (0, 1)], [0, 1]),
    ],
    ids=str,
)
def test_rows_that_are_wanted(
    model: LoadedModel,
    chunks: list[tuple[int, int]],
    wanted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last layer computes these alone; keys and values of the others are in the cache."""
    batch = replace(batch_of(*chunks), logits_indices=torch.tensor(wanted, dtype=torch.int64))
    following = batch_of(*((start + length, 1) for start, length in chunks))
    steps = []
    for has_programs in (True, False):
        monkeypatch.setattr(cpu_ops, "has_programs", lambda _weight, has=has_programs: has)
        cache, run = cache_of(model), Decoder(model.spec, model.weights, 128, ALONE)
        steps.append([run.forward(step, cache) for step in (batch, following)])
    assert steps[0][0].shape[0] == len(wanted)
    assert all(torch.equal(*both) for both in zip(*steps, strict=True))


def test_a_default_dtype_of_the_process_changes_nothing(model: LoadedModel) -> None:
    """Kernels write float32 to addresses: memory of another dtype would be too small."""
    usual = outputs(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        unusual = outputs(model)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(*both) for both in zip(usual, unusual, strict=True))
