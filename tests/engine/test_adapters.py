"""Adapters against transformers with W + scale * B @ A, and against themselves alone."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from family_cases import CASES
from tokenmill.engine import start
from tokenmill.engine.adapters import check_adapters
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.loader import LoadedModel, load, read_spec
from tokenmill.engine.models import quantization
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.low_rank import LowRank
from tokenmill.engine.pipeline import Pipeline
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

Logits = dict[tuple[str, int], torch.Tensor]
#: Every linear that can be adapted; of the fused ones, those of transformers' own modules.
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt-neox": ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "qwen2-moe": ("q_proj", "v_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
}
PROMPT = [(31 + 37 * n) % 320 + 5 for n in range(50)]
#: Of the prompts; those of others have all of it.
LENGTHS = {"base": 43, "b": 31}
DEFAULTS: dict[str, Any] = {"token_budget": 64, "max_num_seqs": 6, "block_size": 4}


class Trained:
    """A random adapter of some linears of transformers' model, not trained at all."""

    def __init__(self, reference: Any, targets: tuple[str, ...], rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rank, self.alpha, self.targets = rank, 3.0, targets
        self.pairs = {}
        for name, module in reference.named_modules():
            if name.endswith(tuple(f".{target}" for target in targets)):
                shape = module.weight.shape
                out, inputs = shape if isinstance(module, torch.nn.Linear) else reversed(shape)
                a = torch.randn(rank, inputs, generator=generator) * 0.2
                self.pairs[name] = (a, torch.randn(out, rank, generator=generator) * 0.2)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """As PEFT names them."""
        return {
            f"base_model.model.{name}.lora_{kind}.weight": tensor
            for name, pair in self.pairs.items()
            for kind, tensor in zip("AB", pair, strict=True)
        }

    def config(self, **more: Any) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": [target.rpartition(".")[2] for target in self.targets],
            "bias": "none",
            "lora_dropout": 0.1,
            "use_dora": False,
            "modules_to_save": None,
        } | more

    def write(self, directory: Path, **more: Any) -> str:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config(**more)))
        save_file(self.tensors, directory / "adapter_model.safetensors")
        return str(directory)

    def merged(self, reference: Any, scale: float) -> Any:
        """transformers' model with the adapter in its weights."""
        merged = copy.deepcopy(reference)
        modules = dict(merged.named_modules())
        with torch.no_grad():
            for name, (a, b) in self.pairs.items():
                weight = modules[name].weight
                added = scale * b @ a
                weight += added if isinstance(modules[name], torch.nn.Linear) else added.T
        return merged


Family = Callable[[str], tuple[LoadedModel, Any]]


@pytest.fixture(scope="module")
def family(
    tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Any]
) -> Family:
    """A model and transformers' own, made once."""
    made: dict[str, tuple[LoadedModel, Any]] = {}

    def make(name: str) -> tuple[LoadedModel, Any]:
        if name not in made:
            kind, overrides = CASES[name]
            directory = tmp_path_factory.mktemp(name)
            reference = write_checkpoint(directory, kind, **overrides)
            made[name] = load(str(directory), device="cpu"), reference
        return made[name]

    return make


@pytest.fixture
def three(family: Family, tmp_path: Path) -> dict[str, str]:
    """Adapters of different ranks and targets for the Llama."""
    _, reference = family("llama")
    targets = TARGETS["llama"]
    some = {"a": (targets, 4), "b": (("q_proj", "v_proj"), 8), "c": (("k_proj", "up_proj"), 3)}
    return {
        name: Trained(reference, chosen, rank, seed).write(tmp_path / name)
        for seed, (name, (chosen, rank)) in enumerate(some.items())
    }


def engine_of(model: LoadedModel, lora: Mapping[str, str], **config: Any) -> Engine:
    engine = Engine(model, EngineConfig(lora=lora, **(DEFAULTS | config)))
    engine.scheduler.output_lengths.record(1)  # admit all at once
    return engine


def answer(
    engine: Engine, *names: str, num_tokens: int = 12, **fields: Any
) -> dict[str, list[int]]:
    """Greedy tokens; a sequence has the name of its adapter, or `base`."""
    for name in names:
        adapter = "" if name == "base" else name
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, adapter=adapter, **fields)
        engine.add(name, PROMPT[: LENGTHS.get(name)], params, seed=0)
    found: dict[str, list[int]] = {name: [] for name in names}
    while engine.has_work:
        for output in engine.step():
            found[output.seq_id] += output.token_ids
    engine.check_integrity()
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_logits_are_those_of_merged_weights(
    name: str, family: Family, tmp_path: Path, seen: Logits
) -> None:
    """Within 2e-4 of transformers computing the whole at once, at budgets of 64 and 7."""
    model, reference = family(name)
    trained = Trained(reference, TARGETS[name], 5, 0)
    lora = {"a": trained.write(tmp_path)}
    for budget in (64, 7):
        output = answer(engine_of(model, lora, token_budget=budget), "a")["a"]
    tokens = torch.tensor([PROMPT + output])
    with torch.inference_mode():
        merged = trained.merged(reference, 3.0 / 5)(tokens).logits[0, 49:-1]
        plain = reference(tokens).logits[0, 49:-1]
    ours = torch.stack([seen["a", 50 + n] for n in range(12)])
    assert (ours - merged).abs().max() < 2e-4
    assert (ours - plain).abs().max() > 0.1, "an adapter that does nothing proves nothing"


def test_rslora_divides_by_the_root_of_the_rank(
    family: Family, tmp_path: Path, seen: Logits
) -> None:
    model, reference = family("llama")
    trained = Trained(reference, ("q_proj", "down_proj"), 4, 0)
    answer(engine_of(model, {"a": trained.write(tmp_path, use_rslora=True)}), "a", num_tokens=1)
    with torch.inference_mode():
        merged = trained.merged(reference, 3.0 / math.sqrt(4))(torch.tensor([PROMPT]))
    assert (seen["a", 50] - merged.logits[0, -1]).abs().max() < 2e-4


def test_each_has_the_same_bits_alone_beside_others_and_in_chunks(
    family: Family, three: dict[str, str], seen: Logits
) -> None:
    model, _ = family("llama")
    names = ("a", "base", "b", "c")
    mixed = answer(engine_of(model, three), *names)
    assert len({tuple(tokens) for tokens in mixed.values()}) == 4
    for budget in (6, 64):
        assert answer(engine_of(model, three, token_budget=budget), *names) == mixed
    for name in names:
        assert answer(engine_of(model, three), name) == {name: mixed[name]}


def test_the_model_alone_is_what_it_is_without_adapters(
    family: Family, three: dict[str, str], seen: Logits
) -> None:
    model, _ = family("llama")
    assert answer(engine_of(model, {}), "base") == answer(engine_of(model, three), "base")


def test_a_preempted_or_resumed_sequence_keeps_its_adapter(
    family: Family, three: dict[str, str], seen: Logits
) -> None:
    model, _ = family("llama")
    whole = answer(engine_of(model, three), "a", "b", "c")
    block_bytes = 2 * model.spec.num_layers * 4 * model.spec.kv_size * 4  # keys and values of 4
    tight = engine_of(model, three, kv_cache_memory=24 * block_bytes, max_model_len=64)
    assert answer(tight, "a", "b", "c") == whole
    assert tight.stats().num_preemptions > 0, tight.stats()
    engine = engine_of(model, three)
    params = SamplingParams(max_tokens=12, ignore_eos=True, adapter="a")
    engine.add("a", PROMPT, params, output_ids=whole["a"][:5], seed=0)
    rest = [token for _ in range(9) for output in engine.step() for token in output.token_ids]
    assert rest == whole["a"][5:]


def test_no_block_is_shared_between_adapters(
    family: Family, three: dict[str, str], seen: Logits
) -> None:
    model, _ = family("llama")
    engine = engine_of(model, three)
    for name in ("a", "base", "b", "a2", "base2"):
        adapter = "" if name.startswith("base") else name[0]
        params = SamplingParams(max_tokens=4, ignore_eos=True, adapter=adapter)
        before = engine.stats().num_cached_tokens
        engine.add(name, PROMPT, params, seed=0)
        while engine.has_work:
            engine.step()
        cached = engine.stats().num_cached_tokens - before
        assert cached == (48 if name.endswith("2") else 0), name
    for name in ("a", "base"):
        assert torch.equal(seen[name, 50], seen[f"{name}2", 50])


def test_prompt_logprobs_and_several_answers_of_an_adapter(
    family: Family, three: dict[str, str]
) -> None:
    model, _ = family("llama")
    with Pipeline(model.name, device="cpu", lora=three, **DEFAULTS) as pipeline:
        fields: dict[str, Any] = {
            "temperature": 1.0,
            "max_tokens": 4,
            "prompt_logprobs": 0,
            "ignore_eos": True,
        }
        first, second = pipeline([PROMPT], n=2, adapter="a", **fields)
        (alone,) = pipeline([PROMPT], adapter="a", **fields)
        (base,) = pipeline([PROMPT], **fields)
    assert first.prompt_logprobs == second.prompt_logprobs == alone.prompt_logprobs
    assert first.prompt_logprobs != base.prompt_logprobs
    assert first.token_ids == alone.token_ids


def test_a_quantized_linear_gets_the_same_added() -> None:
    weight, bias = torch.randn(64, 48), torch.randn(64)
    down, up = torch.randn(4, 48), torch.randn(64, 4)
    low = LowRank(down, up)

    class Halves:
        nbytes = 0

        def __call__(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return torch.nn.functional.linear(rows, weight.half().float(), bias)

    class Scheme:
        name, has_head = "half", True

        def quantize(self, weight: torch.Tensor, row_bits: int) -> quantization.Quantized:
            return Halves()

    linear = Linear(weight.clone(), bias)
    linear.pack(Scheme())  # type: ignore[arg-type]
    rows = torch.randn(6, 48)
    places = torch.tensor([1, 4])
    expected = linear(rows)
    expected[places] += rows[places] @ down.T @ up.T
    assert torch.allclose(linear(rows, [({linear: low}, places)]), expected, atol=1e-5)


def test_the_older_files_of_torch_are_read(family: Family, tmp_path: Path, seen: Logits) -> None:
    model, reference = family("llama")
    trained = Trained(reference, ("q_proj",), 4, 0)
    lora = {"a": trained.write(tmp_path)}
    answer(engine_of(model, lora), "a", num_tokens=1)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(trained.tensors, tmp_path / "adapter_model.bin")
    answer(engine_of(model, lora), "a", num_tokens=1)


@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        ({"peft_type": "IA3"}, "lora.sql.peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, "lora.sql.use_dora must be not set, got True; merge it"),
        ({"bias": "all"}, "lora.sql.bias must be not set, got 'all'"),
        ({"modules_to_save": ["lm_head"]}, "lora.sql.modules_to_save must be not set"),
        ({"rank_pattern": {"q_proj": 2}}, "lora.sql.rank_pattern must be not set"),
        ({"of_tomorrow": 1}, "lora.sql.of_tomorrow must be not set, got 1"),
        ({"init_lora_weights": "pissa"}, "lora.sql.init_lora_weights must be true, gaussian"),
        ({"r": 0}, "lora.sql.r must be an integer of at least 1, got 0"),
        ({"r": 3}, "q_proj must be shaped as its model and r=3 say, got 'A"),
        ({"lora_alpha": None}, "lora.sql.lora_alpha must be a number, got None"),
        ({"target_modules": ["q_proj", "w9"]}, "lora.sql.target_modules must be modules that"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(
    more: dict[str, Any], refusal: str, family: Family, tmp_path: Path
) -> None:
    model, reference = family("llama")
    directory = Trained(reference, ("q_proj",), 4, 0).write(tmp_path, **more)
    with pytest.raises(InvalidRequest) as error:
        engine_of(model, {"sql": directory})
    assert refusal in str(error.value)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"lm_head.lora_A": (4, 48), "lm_head.lora_B": (331, 4)}, "got 'lm_head'; merge it"),
        ({"model.embed_tokens.lora_embedding_A": (4, 331)}, "got 'base_model.model.model.embed"),
        (
            {"model.layers.9.mlp.up_proj.lora_A": (4, 48)},
            "must be lora_A and lora_B of each module",
        ),
        (
            {
                "model.layers.9.mlp.up_proj.lora_A": (4, 48),
                "model.layers.9.mlp.up_proj.lora_B": (80, 4),
            },
            "got 'model.layers.9.mlp.up_proj'",
        ),
        ({"model.layers.0.self_attn.q_proj.lora_A": (4, 50)}, "got 'A (4, 50) and B (48, 4)'"),
        ({"model.layers.0.self_attn.q_proj.lora_B": (47, 4)}, "got 'A (4, 48) and B (47, 4)'"),
        ({"model.layers.0.self_attn.q_proj.lora_B": (48, 5)}, "give the model that it was"),
        ({"model.layers.0.mlp.experts.1.w1.lora_A": (4, 48)}, "of each module, got"),
    ],
)
def test_tensors_of_no_place_are_refused(
    changes: dict[str, tuple[int, int]], refusal: str, family: Family, tmp_path: Path
) -> None:
    model, reference = family("llama")
    trained = Trained(reference, ("q_proj",), 4, 0)
    directory = trained.write(tmp_path)
    added = {f"base_model.model.{key}.weight": torch.ones(shape) for key, shape in changes.items()}
    save_file(trained.tensors | added, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidRequest) as error:
        engine_of(model, {"sql": directory})
    assert refusal in str(error.value)


def test_what_is_no_adapter_is_refused(family: Family, tmp_path: Path) -> None:
    model, _ = family("llama")
    with pytest.raises(InvalidRequest, match=r"lora.sql must be a directory with adapter_config"):
        engine_of(model, {"sql": str(tmp_path)})
    with pytest.raises(InvalidRequest, match="named otherwise than the model"):
        engine_of(model, {model.name: str(tmp_path)})
    with pytest.raises(InvalidRequest, match="lora must be names of 1 to 256 printable"):
        EngineConfig(lora={"": str(tmp_path)})
    with pytest.raises(InvalidRequest, match="lora must be not given where a model is divided"):
        EngineConfig(lora={"sql": str(tmp_path)}, tensor_parallel_size=2)


Refusal = tuple[str, Callable[[Path], object], str]
REFUSALS: list[Refusal] = [
    (
        "no config",
        lambda at: (at / "adapter_config.json").unlink(),
        r"lora.sql must be a directory with adapter_config.json, as PEFT writes it, got ",
    ),
    (
        "no weights",
        lambda at: (at / "adapter_model.safetensors").unlink(),
        r"lora.sql must be a directory with adapter_model.safetensors, as PEFT writes it, got ",
    ),
    ("no JSON", lambda at: (at / "adapter_config.json").write_text("{"), r"is not JSON"),
    (
        "a file that ends early",
        lambda at: (at / "adapter_model.safetensors").write_bytes(b"\x01"),
        r"is not a whole safetensors file",
    ),
    (
        "another rank",
        lambda at: _set(at, r=7),
        r"q_proj must be shaped as its model and r=7 say, got 'A \(4, 48\) and B \(48, 4\)'; give",
    ),
    (
        "a target without tensors",
        lambda at: _set(at, target_modules=["q_proj", "w9"]),
        r"lora.sql.target_modules must be modules that the file has tensors of, got 'w9'; save it",
    ),
    (
        "another model",
        lambda at: save_file(
            {
                f"model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.zeros(shape)
                for part, shape in (("A", (4, 64)), ("B", (64, 4)))
            },
            at / "adapter_model.safetensors",
        ),
        r"must be shaped as its model and r=4 say, got 'A \(4, 64\) and B \(64, 4\)'; give",
    ),
]


def _set(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("change", "refusal"), [case[1:] for case in REFUSALS],
                         ids=[case[0] for case in REFUSALS])  # fmt: skip
def test_a_bad_adapter_is_refused_before_the_model_is_loaded(
    change: Callable[[Path], object],
    refusal: str,
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, reference = family("llama")
    directory = Trained(reference, ("q_proj",), 4, 0).write(tmp_path)
    change(tmp_path)

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(start, "load", loaded)
    with pytest.raises((InvalidRequest, UnsupportedModel), match=refusal):
        start.start_engine(model.name, EngineConfig(lora={"sql": directory}), device="cpu")


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_refused_early_is_what_is_refused_late(
    name: str, family: Family, tmp_path: Path
) -> None:
    """All linears of a family are found in the shapes alone."""
    model, reference = family(name)
    directory = Trained(reference, TARGETS[name], 4, 0).write(tmp_path)
    check_adapters({"a": directory}, model.name, read_spec(model.name))


def test_an_adapter_that_is_not_loaded_is_refused_with_those_that_are(
    family: Family, three: dict[str, str]
) -> None:
    model, _ = family("llama")
    engine = engine_of(model, three)
    with pytest.raises(InvalidRequest, match=r"adapter must be one of .* \(a, b, c\), got 'sql'"):
        engine.add("x", PROMPT, SamplingParams(adapter="sql"), seed=0)
    assert not engine.has_work
    with pytest.raises(InvalidRequest, match=r"loaded here \(none\), got 'sql'"):
        engine_of(model, {}).add("x", PROMPT, SamplingParams(adapter="sql"), seed=0)
