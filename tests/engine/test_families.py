"""Every family against transformers: the same logits and tokens, whole, chunked and in a batch.

Each case is a tiny random checkpoint with every feature of its family on: windows shorter than the
prompt, several experts, fewer KV heads than heads. The table in docs/models.md is made from them:
`python tests/engine/test_families.py` writes it anew.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.models.decoder import Decoder
from tokenmill.engine.models.families import FAMILIES
from tokenmill.producer.params import SamplingParams

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
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
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "head_dim": 20}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-3.1-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "sliding_window": WINDOW}),
    "qwen": ("qwen2", {"num_key_value_heads": 6}),  # renamed by `as_first_qwen`
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
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {**LINEAR_ROPE, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
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


def as_first_qwen(directory: Path) -> None:
    """Rename a Qwen2 checkpoint to the first Qwen's form, which computes the same."""
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text())
    stored = load_file(directory / "model.safetensors")
    tensors = {
        "transformer.wte.weight": stored["model.embed_tokens.weight"],
        "transformer.ln_f.weight": stored["model.norm.weight"],
        "lm_head.weight": stored["lm_head.weight"],
    }
    for number in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{number}.", f"transformer.h.{number}."
        for kind in ("weight", "bias"):
            parts = [stored[f"{ours}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[f"{theirs}attn.c_attn.{kind}"] = torch.cat(parts)
        for new, old in {
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            tensors[f"{theirs}{new}.weight"] = stored[f"{ours}{old}.weight"]
    save_file(tensors, directory / "model.safetensors")
    kept = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    qwen = {name: config[name] for name in kept} | {
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
    (directory / "config.json").write_text(json.dumps(qwen))


@pytest.fixture(scope="module", params=CASES)
def directory_and_reference(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_checkpoint: Callable[..., Any],
) -> tuple[Path, Any]:
    family, overrides = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    reference = write_checkpoint(directory, family, **overrides)
    if request.param == "qwen":
        as_first_qwen(directory)
    return directory, reference


@pytest.fixture
def case(directory_and_reference: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> Case:
    """The case, which collects every row of logits that an engine samples from."""
    directory, reference = directory_and_reference
    case = Case(load(str(directory), device="cpu"), reference)
    made = Decoder.logits

    def recording(self: Decoder, *args: Any) -> torch.Tensor:
        logits = made(self, *args)
        case.rows.extend(logits.clone())
        return logits

    monkeypatch.setattr(Decoder, "logits", recording)
    return case


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """32 greedy tokens of each prompt."""
    for number, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=32, ignore_eos=True)
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


def test_logits_and_tokens_whole_and_chunked(case: Case) -> None:
    """Within 2e-4 of transformers computing the whole at once, at budgets of 256, 64, 7 and 1."""
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


def test_a_mixed_batch_of_eight(case: Case) -> None:
    prompts = random_prompts(1, 2, 5, 17, 33, 48, 3, 9)
    engine = Engine(case.model, EngineConfig(token_budget=24, block_size=4))
    for prompt, output in zip(prompts, run(engine, prompts), strict=True):
        assert case.expected(prompt, output).argmax(-1).tolist() == output


def test_every_family_has_a_case() -> None:
    tested = {family for family, _ in CASES.values()} | {"qwen"}
    assert set(FAMILIES) - tested == {"gemma3"}  # the text of it is gemma3_text's, see below
