"""Every family against transformers: the same logits and tokens, whole, chunked and in a batch.

Each case is a tiny random checkpoint with every feature of its family on: windows shorter than the
prompt, several experts, fewer KV heads than heads. The table in docs/models.md is made from them by
`make docs`.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from device_kernels import put_in_place
from family_cases import CASES, RENAMED, WINDOW, rename
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.models.decoder import Decoder
from tokenmill.engine.models.families import FAMILIES, spec_from_config
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.producer.params import SamplingParams

# Read where triton is first imported, which transformers may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: make docs -->\n", "<!-- end of table -->\n"


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


CaseOf = Callable[[str], Case]


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
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "olmo2"])
def test_the_triton_kernels_give_the_same(
    name: str, case_of: CaseOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted: window and soft cap; layer norm and no rotation; a norm of all heads."""
    put_in_place(monkeypatch)
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
