"""Every family against transformers: the same logits and tokens, whole, chunked and in a batch.

Each case is a tiny random checkpoint with every feature of its family on: windows shorter than the
prompt, several experts, fewer KV heads than heads. The table in docs/models.md is made from them by
`make docs`.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.models.decoder import Decoder
from tokenmill.engine.models.families import FAMILIES, spec_from_config
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.kernels import ops
from tokenmill.producer.params import SamplingParams

# Read where triton is first imported, which transformers may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: make docs -->\n", "<!-- end of table -->\n"
WINDOW = 12
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 5.0],
}
GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 256, "n_inner": 80}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {**LINEAR_ROPE, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 20}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-3.1-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "sliding_window": WINDOW}),
    "qwen": ("qwen2", {"num_key_value_heads": 6}),  # renamed below
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-with-images": ("gemma3_text", GEMMA3),  # renamed below
    "phi": (
        "phi",
        {"rope_parameters": {"partial_rotary_factor": 0.4, "rope_theta": 1e4}, "head_dim": 20},
    ),
    "phi-qk-norm": ("phi", {"qk_layernorm": True}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3-long-rope": (
        "phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16},
    ),
    "falcon-7b": ("falcon", {"multi_query": True}),
    "falcon-40b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80},
    ),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-serial": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt-neox": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}),
    "gpt-neox-serial": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt": ("opt", {"ffn_dim": 80}),
    "opt-no-bias": ("opt", {"ffn_dim": 80, "enable_bias": False, "activation_function": "gelu"}),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk, and what transformers computes from the same weights."""

    model: LoadedModel
    reference: Any
    rows: list[torch.Tensor] = field(default_factory=list)

    def expected(self, prompt: list[int], output: list[int]) -> torch.Tensor:
        """The logits behind each token of `output`, all computed at once."""
        with torch.inference_mode():
            logits = self.reference(torch.tensor([prompt + output])).logits
        wanted: torch.Tensor = logits[0, len(prompt) - 1 : -1]
        return wanted


def first_qwen_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the first Qwen, whose code is not in transformers, that means this Qwen2."""
    kept = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    return {name: config[name] for name in kept} | {
        "model_type": "qwen",
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "max_position_embeddings": 512,
        "no_bias": True,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "seq_length": 256,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }


def first_qwen_tensors(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    paths = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.w1",
        "mlp.gate_proj": "mlp.w2",
        "mlp.down_proj": "mlp.c_proj",
    }
    tensors = {}
    for name, tensor in stored.items():
        if ".q_proj" in name:
            parts = [stored[name.replace(".q_proj", f".{x}_proj")] for x in "qkv"]
            name, tensor = name.replace("self_attn.q_proj", "attn.c_attn"), torch.cat(parts)  # noqa: PLW2901
        elif ".k_proj" in name or ".v_proj" in name:
            continue
        for theirs, ours in paths.items():
            name = name.replace(theirs, ours)  # noqa: PLW2901
        tensors[name] = tensor
    return tensors


def with_images_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a Gemma 3 that also sees images: the text's inside it."""
    return {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 8}}


def with_images_tensors(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    return tensors | {"vision_tower.vision_model.head.weight": torch.zeros(3)}


#: Cases that transformers cannot write as they are found: the config and the tensors are renamed.
RENAMED = {
    "qwen": (first_qwen_config, first_qwen_tensors),
    "gemma3-with-images": (with_images_config, with_images_tensors),
}


def rename(directory: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    config, tensors = RENAMED[name]
    file = directory / "config.json"
    file.write_text(json.dumps(config(json.loads(file.read_text()))))
    stored = load_file(directory / "model.safetensors")
    save_file(tensors(stored), directory / "model.safetensors")


CaseOf = Callable[[str], Case]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other at every tiny operation cost most of the time here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint_of(
    tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Any]
) -> Callable[[str], tuple[Path, Any]]:
    """The directory of a case and transformers' model, made once."""

    @functools.cache
    def make(name: str) -> tuple[Path, Any]:
        family, overrides = CASES[name]
        directory = tmp_path_factory.mktemp(name)
        reference = write_checkpoint(directory, family, **overrides)
        if name in RENAMED:
            rename(directory, name)
        return directory, reference

    return make


@pytest.fixture
def case_of(
    checkpoint_of: Callable[[str], tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> CaseOf:
    """A case, which collects every row of logits that an engine samples from."""

    def make(name: str) -> Case:
        directory, reference = checkpoint_of(name)
        case = Case(load(str(directory), device="cpu"), reference)
        made = Decoder.logits

        def recording(self: Decoder, *args: Any) -> torch.Tensor:
            logits = made(self, *args)
            case.rows.extend(logits.clone())
            return logits

        monkeypatch.setattr(Decoder, "logits", recording)
        return case

    return make


def run(engine: Engine, prompts: list[list[int]], max_tokens: int = 32) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        engine.add(str(number), prompt, params, seed=0)
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            outputs[int(output.seq_id)] += output.token_ids
    engine.check_integrity()
    return outputs


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.manual_seed(1)
    return [torch.randint(3, 331, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_whole_and_chunked(name: str, case_of: CaseOf) -> None:
    """Within 2e-4 of transformers computing the whole at once, at budgets of 256, 64, 7 and 1."""
    case = case_of(name)
    (prompt,) = random_prompts(90)
    for budget in (256, 64, 7, 1):
        case.rows.clear()
        config = EngineConfig(token_budget=budget, max_num_seqs=1, block_size=4)
        (output,) = run(Engine(case.model, config), [prompt])
        expected = case.expected(prompt, output)
        assert len(output) == 32
        assert (torch.stack(case.rows) - expected).abs().max() < 2e-4, budget
        assert expected.argmax(-1).tolist() == output, budget
        assert expected.std() > 0.1, "a flat model proves nothing"


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch_of_eight(name: str, case_of: CaseOf) -> None:
    case = case_of(name)
    prompts = random_prompts(1, 2, 5, 17, 33, 48, 3, 9)
    engine = Engine(case.model, EngineConfig(token_budget=24, block_size=4))
    for prompt, output in zip(prompts, run(engine, prompts), strict=True):
        assert case.expected(prompt, output).argmax(-1).tolist() == output


def test_long_rope_of_a_short_context_has_the_short_factors(case_of: CaseOf) -> None:
    case = case_of("phi3-long-rope")
    (prompt,) = random_prompts(7)
    config = EngineConfig(token_budget=5, max_num_seqs=1, block_size=4, max_model_len=16)
    (output,) = run(Engine(case.model, config), [prompt])
    assert len(output) == 9
    assert (torch.stack(case.rows) - case.expected(prompt, output)).abs().max() < 2e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_the_triton_kernels_give_the_same(
    name: str, case_of: CaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted, in the place of what a CPU runs: window and soft cap, and no rotation."""
    from tokenmill.kernels import gated_activation, paged_attention, rms_norm, rope_kv

    monkeypatch.setattr(ops, "rms_norm", rms_norm.rms_norm)
    monkeypatch.setattr(ops, "add_rms_norm", rms_norm.add_rms_norm)
    monkeypatch.setattr(ops, "gated_activation", gated_activation.gated_activation)
    monkeypatch.setattr(ops, "rope_store_kv", rope_kv.rope_store_kv)
    monkeypatch.setattr(ops, "paged_attention", paged_attention.paged_attention)
    case = case_of(name)
    (prompt,) = random_prompts(WINDOW + 2)
    config = EngineConfig(token_budget=7, max_num_seqs=1, block_size=4, max_model_len=32)
    (output,) = run(Engine(case.model, config), [prompt], max_tokens=2)
    assert (torch.stack(case.rows) - case.expected(prompt, output)).abs().max() < 2e-4


def features(spec: ModelSpec) -> list[str]:
    """What a spec asks of the decoder beyond a plain Llama, in words."""
    moe, ropes = spec.moe, {rope for rope in spec.ropes if rope}
    said: dict[str, object] = {
        "learned positions": spec.position_offset is not None,
        "partial rotary": any(rope.dim < spec.head_dim for rope in ropes),
        "layers without positions": ropes and None in spec.ropes,
        "two rotary bases": len({rope.theta for rope in ropes}) > 1,
        **{f"{rope.kind} rotary scaling": rope.kind != "default" for rope in ropes},
        "sliding window": any(spec.windows),
        "window in some layers": any(spec.windows) and None in spec.windows,
        "GQA": 1 < spec.num_kv_heads < spec.num_heads,
        "one KV head": spec.num_kv_heads == 1,
        "QK norm per head": spec.qk_norm == "head",
        "QK norm over all heads": spec.qk_norm == "whole",
        "attention soft cap": spec.attention_softcap,
        "logit soft cap": spec.logit_softcap,
        "parallel attention and MLP": spec.parallel,
        "layer norm": spec.layer_norm,
        "norms of outputs": spec.post_norm,
        "norm weights from 1": spec.norm_offset,
        "scaled embedding": spec.embedding_scale != 1.0,
        "tied head": spec.tied_embeddings,
        "biases": spec.qkv_bias or spec.out_bias or spec.mlp_bias,
        "bias of the head": spec.head_bias,
        "plain MLP": not spec.gated,
        spec.activation.replace("_", " "): spec.activation != "silu",
        "experts": moe,
        "shared expert": moe and moe.shared_intermediate_size,
        "layers without experts": moe and not all(moe.layers),
    }
    return [feature for feature, is_there in said.items() if is_there]


def table(tiny_config: Callable[..., Any]) -> str:
    """A row for each family: what it is, what its cases switch on, and their names."""
    rows: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in sorted(FAMILIES)}
    for name, (family, overrides) in CASES.items():
        config = tiny_config(family, **overrides).to_dict()
        if name in RENAMED:
            config = RENAMED[name][0](config)
        spec = spec_from_config(config)
        known, cases = rows[spec.family]
        known += [feature for feature in features(spec) if feature not in known]
        cases.append(f"`{name}`")
    lines = ["| model_type | models | features tested | cases |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {FAMILIES[name].models} | {', '.join(known)} | {', '.join(cases)} |"
        for name, (known, cases) in rows.items()
    ]
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_up_to_date(tiny_config: Callable[..., Any]) -> None:
    """`UPDATE_DOCS=1` writes it; a family without a case has an empty row, which is refused."""
    before, begin, rest = DOCS.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    wanted = before + begin + table(tiny_config) + end + after
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(wanted)
    assert begin
    assert end
    assert DOCS.read_text() == wanted, "run: make docs"
    assert "|  |" not in wanted
