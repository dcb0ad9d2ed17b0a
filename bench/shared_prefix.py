"""Claim: prompts that share a system prompt have it computed once: over 85% fewer prompt tokens,
the wall time falls with them, and every answer is the same.

Requests of 1,000 shared and 40 own tokens on the CPU with SmolLM2, greedy, caching on and off in
turns. Without it nearly all the time goes, to the same work over and over: --off 50 computes only
the first 50 requests so, and the ratios are of seconds and tokens a request.

    python bench/shared_prefix.py [--requests 200] [--off 200] [--output 60] [--rounds 1]
"""

import argparse
import os
import random
import statistics
import time

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the worker sets it

from workloads import Workload, write_result

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import load
from tokenmill.engine.sources import pull
from tokenmill.producer.params import SamplingParams

SHARED, OWN = 1000, 40


def answers(
    prompts: list[list[int]], output: int, *, caching: bool
) -> tuple[dict[str, list[int]], int, float]:
    """(tokens of every answer, prompt tokens computed, seconds)."""
    engine = Engine(
        load("smollm2", device="cpu"),
        EngineConfig(prefix_caching=caching, token_budget=256),  # equal steps on both sides
    )
    params = SamplingParams(max_tokens=output, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, params, seed=number)
    got: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    started = time.perf_counter()
    while engine.has_work:
        for item in engine.step():
            got[item.seq_id] += item.token_ids
    seconds = time.perf_counter() - started
    engine.check_integrity()
    # Every output token but the last goes through the model as well.
    computed = engine.stats().num_computed_tokens - len(prompts) * (output - 1)
    return got, computed, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--off", type=int, help="requests computed without caching (all)")
    parser.add_argument("--output", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    pull("smollm2")
    draw = random.Random(0)
    shared = [draw.randrange(49152) for _ in range(SHARED)]
    prompts = [
        shared + [draw.randrange(49152) for _ in range(OWN)] for _ in range(options.requests)
    ]
    without = prompts[: options.off]
    on_s, off_s = [], []
    for _ in range(options.rounds):
        on, computed_on, seconds = answers(prompts, options.output, caching=True)
        on_s.append(seconds)
        off, computed_off, seconds = answers(without, options.output, caching=False)
        off_s.append(seconds)
        if any(on[seq_id] != tokens for seq_id, tokens in off.items()):
            raise SystemExit("answers with and without caching differ")
        print(f"on {on_s[-1]:.1f} s, off {off_s[-1]:.1f} s, answers equal", flush=True)
    share = len(prompts) / len(without)
    fall = 1 - computed_on / (computed_off * share)
    if fall < 0.85:
        raise SystemExit(f"prompt tokens computed fell by {fall:.1%} only")
    figures: dict[str, object] = {
        "requests": {"on": len(prompts), "off": len(without)},
        "prompt_tokens_computed": {"on": computed_on, "off": computed_off, "fall": fall},
        "seconds": {
            "on": {"median": statistics.median(on_s), "all": on_s},
            "off": {"median": statistics.median(off_s), "all": off_s},
        },
        "time_ratio": share * statistics.median(off_s) / statistics.median(on_s),
        "answers_equal": True,
    }
    workload = Workload("shared prefix", options.requests, SHARED + OWN, options.output)
    path = write_result("shared_prefix", workload, figures)
    print(
        f"prompt tokens computed a request {computed_off / len(without):.0f} -> "
        f"{computed_on / len(prompts):.0f} (-{fall:.1%}), {figures['time_ratio']:.1f} times as "
        f"fast; {path}"
    )


if __name__ == "__main__":
    main()
