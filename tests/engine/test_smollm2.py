"""The real model: greedy tokens equal transformers', its tokenizer and template too."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from questions import QUESTIONS
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.sources import resolve
from tokenmill.producer.logprobs import TokenLogprobs
from tokenmill.producer.params import SamplingParams

NUM_TOKENS = 24
END = 2
#: A token that is not the best counts only where its logit is further behind than this.
TIE = 1e-3


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    path = resolve("smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def prompts(smollm2: LoadedModel) -> list[list[int]]:
    template = smollm2.tokenizer.apply_chat_template
    return [template([{"role": "user", "content": question}]) for question in QUESTIONS]


GreedyCheck = Callable[[str, list[int], list[int]], None]


@pytest.fixture(scope="module")
def assert_greedy(reference: Any) -> GreedyCheck:
    """`assert_greedy(question, prompt, output)`: each token is the best of transformers' logits."""

    @functools.cache
    def behind(prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
        """How far the logit of each token, and of the end, is behind the best: [T]."""
        ended = (*output, END)[:NUM_TOKENS]
        with torch.inference_mode():
            logits: torch.Tensor = reference(torch.tensor([prompt + ended[:-1]])).logits[0]
        logits = logits[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(ended)[:, None])[:, 0]
        return logits.max(-1).values - chosen

    def check(question: str, prompt: list[int], output: list[int]) -> None:
        assert behind(tuple(prompt), tuple(output)).max() < TIE, question

    return check


def generate(model: LoadedModel, prompts: list[list[int]], config: EngineConfig) -> list[list[int]]:
    engine = Engine(model, config)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, SamplingParams(max_tokens=NUM_TOKENS), seed=0)
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            outputs[int(output.seq_id)] += output.token_ids
    engine.check_integrity()
    return outputs


@pytest.mark.parametrize(
    "first", [17, pytest.param(0, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_greedy_equals_transformers_alone(
    smollm2: LoadedModel, prompts: list[list[int]], assert_greedy: GreedyCheck, first: int
) -> None:
    for question, prompt in list(zip(QUESTIONS, prompts, strict=True))[first:]:
        (output,) = generate(smollm2, [prompt], EngineConfig(token_budget=256))
        assert_greedy(question, prompt, output)


@pytest.mark.parametrize(
    "budget",
    [32, pytest.param(256, marks=pytest.mark.slow)],
    ids=["budget 32", "one batch"],
)
def test_greedy_equals_transformers_in_a_batch(
    smollm2: LoadedModel, prompts: list[list[int]], assert_greedy: GreedyCheck, budget: int
) -> None:
    outputs = generate(smollm2, prompts, EngineConfig(token_budget=budget, max_num_seqs=20))
    for question, prompt, output in zip(QUESTIONS, prompts, outputs, strict=True):
        assert_greedy(question, prompt, output)


def test_log_probabilities_equal_transformers(
    smollm2: LoadedModel, reference: Any, prompts: list[list[int]]
) -> None:
    """Of prompt and output, within 1e-4, in a batch with a small budget."""
    engine = Engine(smollm2, EngineConfig(token_budget=24, max_num_seqs=4))
    params = SamplingParams(max_tokens=4, logprobs=3, prompt_logprobs=0)
    for number, prompt in enumerate(prompts[:4]):
        engine.add(str(number), prompt, params, seed=0)
    told: list[list[TokenLogprobs]] = [[] for _ in range(4)]
    while engine.has_work:
        for output in engine.step():
            told[int(output.seq_id)] += [*output.prompt_logprobs, *output.logprobs]
    for prompt, rows in zip(prompts, told, strict=False):
        ids = [prompt[0], *(row.token_id for row in rows)]
        assert ids[: len(prompt)] == prompt
        with torch.inference_mode():
            expected = reference(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        for row, want in zip(rows, expected, strict=True):
            assert row.logprob == pytest.approx(want[row.token_id].item(), abs=1e-4)
            assert [v for _, v in row.top] == pytest.approx(
                want.topk(len(row.top)).values.tolist(), abs=1e-4
            )


def test_tokenizer_equals_transformers(smollm2: LoadedModel, smollm2_tokenizer: Any) -> None:
    theirs = smollm2_tokenizer
    texts = [*QUESTIONS, "  spaces\n\n\tand 12345 <|im_end|> x", "", "a\r\nb", "\u200b\u0301é"]
    for text in texts:
        ids = smollm2.tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert smollm2.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ours = smollm2.tokenizer.apply_chat_template(messages)
    assert ours == theirs(rendered, add_special_tokens=False)["input_ids"]
