"""Claim: on a CPU, SmolLM2-135M in float32 runs at 80% of the roofline on W1 and W2, 65% on W3.

The engine alone, in this process: no queue, no text. Total tokens/s = (prompt + generated) / wall
time. In each round the ceilings are measured, then each workload is run; `roofline.py` says what a
workload takes at the ceilings. `--profile` adds where the time of the steps goes (and costs some).

    python bench/cpu_engine.py [--workload W1 ...] [--rounds 3] [--requests N] [--profile]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the worker sets it, before torch is loaded

from roofline import Ceilings, measure_ceilings, need
from step_profile import StepProfile
from workloads import WORKLOADS, Workload, write_result

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.producer.params import SamplingParams

#: Runs a workload once and returns the seconds that it took.
Runner = Callable[[Workload], float]


class Ours:
    """The engine in this process; the model is loaded once, each run has an engine of its own."""

    def __init__(self, model: LoadedModel, config: EngineConfig, *, is_profiled: bool) -> None:
        self.model = model
        self.profiles: dict[str, StepProfile] = {}
        self.budgets: list[int] = []
        self._config = config
        self._is_profiled = is_profiled

    def __call__(self, workload: Workload) -> float:
        engine = Engine(self.model, self._config)
        self.budgets.append(engine.scheduler.token_budget)
        _add(engine, "warm", [1, 2, 3], 2)
        _drain(engine)
        requests = workload.prompts(engine.vocab_size)
        profile = self.profiles.setdefault(workload.name, StepProfile())
        with profile.recording() if self._is_profiled else nullcontext():
            started = time.perf_counter()
            for number, (prompt, output) in enumerate(requests):
                _add(engine, str(number), prompt, output)
            generated = _drain(engine)
            seconds = time.perf_counter() - started
        if generated != sum(output for _, output in requests):
            raise SystemExit(f"{workload.name}: {generated} tokens came, fewer than were asked for")
        return seconds


def _add(engine: Engine, name: str, prompt: list[int], output: int) -> None:
    engine.add(name, prompt, SamplingParams(max_tokens=output, ignore_eos=True), seed=0)


def _drain(engine: Engine) -> int:
    """Step until nothing is left; returns the tokens that came."""
    generated = 0
    while engine.has_work:
        generated += sum(len(output.token_ids) for output in engine.step())
    return generated


def tokens_of(workload: Workload, vocabulary: int) -> int:
    return sum(len(prompt) + output for prompt, output in workload.prompts(vocabulary))


def share_of_roofline(ours: Ours, workload: Workload, seconds: float, ceilings: Ceilings) -> float:
    spec = ours.model.spec
    requests = [(len(p), output) for p, output in workload.prompts(spec.vocab_size)]
    return need(spec, requests).seconds(ceilings) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workload", nargs="+", choices=sorted(WORKLOADS), default=["W1", "W2", "W3"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="only the first of each workload")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    workloads = [WORKLOADS[name] for name in options.workload]
    if options.requests:
        workloads = [replace(w, requests=min(w.requests, options.requests)) for w in workloads]
    model = load("smollm2", device="cpu")
    ours = Ours(model, EngineConfig(token_budget=options.token_budget), is_profiled=options.profile)
    rates: dict[str, list[float]] = {w.name: [] for w in workloads}
    shares: dict[str, list[float]] = {w.name: [] for w in workloads}
    ceilings = []
    for number in range(options.rounds):
        ceilings.append(measure_ceilings())
        for workload in workloads:
            seconds = ours(workload)
            rates[workload.name].append(tokens_of(workload, model.spec.vocab_size) / seconds)
            shares[workload.name].append(share_of_roofline(ours, workload, seconds, ceilings[-1]))
            print(
                f"round {number + 1}, {workload.name}: {seconds:.1f} s, "
                f"{rates[workload.name][-1]:.0f} tokens/s, "
                f"{shares[workload.name][-1]:.1%} of the roofline "
                f"({ceilings[-1].flops_per_s / 1e9:.0f} GFLOP/s, "
                f"{ceilings[-1].bytes_per_s / 1e9:.0f} GB/s, budget {ours.budgets[-1]})",
                flush=True,
            )
    for name, profile in ours.profiles.items():
        if options.profile:
            print(name, *profile.lines(), sep="\n")
    if options.requests or options.profile:
        return  # a part of a workload, or slowed down: no figure to keep
    figures: dict[str, Any] = {
        "ceilings": [asdict(c) for c in ceilings],
        "token_budgets": ours.budgets,
        "workloads": {
            w.name: asdict(w)
            | {"tokens_per_s": _spread(rates[w.name]), "of_roofline": _spread(shares[w.name])}
            for w in workloads
        },
    }
    path = write_result("cpu_engine", None, figures)
    for name, measured in rates.items():
        print(
            f"{name}: {statistics.median(measured):.0f} tokens/s, "
            f"{statistics.median(shares[name]):.1%} of the roofline"
        )
    print(path)


def _spread(values: list[float]) -> dict[str, object]:
    return {"median": statistics.median(values), "all": values}


if __name__ == "__main__":
    main()
