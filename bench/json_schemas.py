"""Claim: with the real small model, output held to a JSON schema parses and validates: 100 of 100
random schemas, sampled at temperature 1.

    python bench/json_schemas.py [--count 100] [--seed 0]

Schemas are nested up to three levels; strings, arrays and numbers have bounds, so that an answer of
`MAX_TOKENS` always has room for its end. Validated by the `jsonschema` package.
"""

import argparse
import json
import random
import statistics
import string
import time
from typing import Any

from jsonschema import Draft202012Validator
from workloads import write_result

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import load
from tokenmill.producer.params import SamplingParams

MAX_TOKENS = 2000


def schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A random schema; objects and arrays only while `depth` is left."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern", "format"]
    kind = draw.choice(kinds + ["object", "array", "anyOf", "optional"] * (2 if depth else 0))
    match kind:
        case "string":
            low = draw.randrange(4)
            return {"type": "string", "minLength": low, "maxLength": low + draw.randrange(1, 12)}
        case "integer" | "number":
            low = draw.randrange(-1000, 1000)
            bounds = {"minimum": low, "maximum": low + draw.randrange(1, 2000)}
            step = {"multipleOf": 0.25} if kind == "number" else {}
            return {"type": kind, **bounds, **step}
        case "boolean" | "null":
            return {"type": kind}
        case "enum":
            values = ["red", 7, None, True, "naïve", 'a"b', -1.5]
            return {"enum": draw.sample(values, draw.randrange(1, 5))}
        case "pattern":
            return {
                "type": "string",
                "pattern": draw.choice(["^[a-z]{2,8}$", "^(no|yes)+$", r"^\d{3}-\d{4}$"]),
                "maxLength": 20,
            }
        case "format":
            return {"type": "string", "format": draw.choice(["date", "time", "uuid"])}
        case "array":
            low = draw.randrange(3)
            items = schema(draw, depth - 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + 3}
        case "anyOf":
            return {"anyOf": [schema(draw, depth - 1) for _ in range(draw.randrange(2, 4))]}
        case _:
            return record(draw, depth, optional=kind == "optional")


def record(draw: random.Random, depth: int, *, optional: bool = False) -> dict[str, Any]:
    """An object of one to five members; all of them required, or some."""
    names = draw.sample(
        ["id", "name", "größe", "a b", *string.ascii_lowercase], draw.randrange(1, 6)
    )
    required = draw.sample(names, draw.randrange(len(names))) if optional else names
    return {
        "type": "object",
        "properties": {name: schema(draw, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def main() -> None:
    """Answer every schema once, and count the answers that hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    schemas = [record(draw, 3, optional=bool(number % 2)) for number in range(args.count)]
    began = time.perf_counter()
    answers = generate(schemas)
    seconds = time.perf_counter() - began
    failed = [
        {"schema": wanted, "text": text, "errors": errors}
        for wanted, (text, _) in zip(schemas, answers, strict=True)
        if (errors := problems(wanted, text))
    ]
    sizes = [size for _, size in answers]
    figures = {
        "schemas": args.count,
        "seed": args.seed,
        "valid": args.count - len(failed),
        "failed": failed,
        "schema_bytes": {"median": statistics.median(len(json.dumps(s)) for s in schemas)},
        "answer_tokens": {"median": statistics.median(sizes), "max": max(sizes)},
        "seconds": round(seconds, 1),
    }
    print(write_result("json_schemas", None, figures).read_text())


def generate(schemas: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """One answer to each schema, in one batch: its text and its tokens."""
    engine = Engine(load("smollm2", device="cpu"), EngineConfig())
    for number, wanted in enumerate(schemas):
        prompt = f"Fill in plausible values, in JSON by this schema: {json.dumps(wanted)[:200]}"
        engine.add(
            str(number),
            engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}]),
            SamplingParams(json_schema=json.dumps(wanted), temperature=1.0, max_tokens=MAX_TOKENS),
            seed=number,
        )
    tokens: list[list[int]] = [[] for _ in schemas]
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.seq_id)] += output.token_ids
    return [(engine.tokenizer.decode(ids), len(ids)) for ids in tokens]


def problems(wanted: dict[str, Any], text: str) -> list[str]:
    """What is wrong with an answer."""
    try:
        return [e.message for e in Draft202012Validator(wanted).iter_errors(json.loads(text))]
    except ValueError as error:
        return [str(error)]


if __name__ == "__main__":
    main()
