"""Claim: what a quantized SmolLM2 loses against float32: perplexity, and greedy tokens.

The text is prose that comes with every Python: the language reference in `pydoc_data.topics`, in
windows of 512 tokens, and the questions of `examples/questions.jsonl`. Perplexity is that of the
engine's own `prompt_logprobs`; forced agreement is the share of the text's positions at which both
find the same token likeliest; free agreement, over the questions, the share of answers whose 48
greedy tokens are all the same, and the mean share of a common beginning.

    python bench/quantization.py [--quantization int8] [--windows 16]
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pydoc_data.topics import topics

from workloads import ROOT, write_result

from tokenmill.engine.pipeline import Pipeline

WINDOW, ANSWER = 512, 48


@dataclass(frozen=True)
class Reading:
    """What a model says of the text: log probability and likeliest token of each position."""

    logprobs: list[float]
    likeliest: list[int]
    answers: list[tuple[int, ...]]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))


def windows(pipeline: Pipeline, count: int) -> list[list[int]]:
    """Token ids from the beginnings of the longest topics, one window of each."""
    texts = sorted(topics.values(), key=len, reverse=True)[:count]
    return [pipeline.encode(text)[:WINDOW] for text in texts]


def questions() -> list[list[dict[str, str]]]:
    lines = (ROOT / "examples" / "questions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return [[{"role": "user", "content": row["prompt"]}] for row in rows if "prompt" in row]


def read(quantization: str, count: int) -> Reading:
    pipeline = Pipeline("smollm2", device="cpu", quantization=quantization, token_budget=256)
    told = pipeline(windows(pipeline, count), max_tokens=1, prompt_logprobs=1)
    rows = [row for generation in told for row in generation.prompt_logprobs]
    answers = pipeline(questions(), max_tokens=ANSWER)
    return Reading(
        [row.logprob for row in rows],
        [row.top[0][0] for row in rows],
        [answer.token_ids for answer in answers],
    )


def common(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The share of the longer one that both begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(same)) / max(len(one), len(other), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantization", default="int8")
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    plain = read("none", options.windows)
    quantized = read(options.quantization, options.windows)
    positions = list(zip(plain.likeliest, quantized.likeliest, strict=True))
    pairs = list(zip(plain.answers, quantized.answers, strict=True))
    figures: dict[str, object] = {
        "model": "smollm2",
        "quantization": options.quantization,
        "text": f"pydoc_data.topics, the first {WINDOW} tokens of the {options.windows} longest",
        "positions": len(positions),
        "perplexity": {"none": plain.perplexity, options.quantization: quantized.perplexity},
        "perplexity_ratio": quantized.perplexity / plain.perplexity,
        "forced_agreement": sum(a == b for a, b in positions) / len(positions),
        "answers": len(pairs),
        "answers_equal": sum(a == b for a, b in pairs) / len(pairs),
        "answers_common": sum(common(*pair) for pair in pairs) / len(pairs),
    }
    path = write_result(f"quantization_{options.quantization}", None, figures)
    print(json.dumps(figures, indent=2))
    print(path)


if __name__ == "__main__":
    main()
