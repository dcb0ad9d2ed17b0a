"""Claim: on a CPU, SmolLM2-135M in float32 runs at 80% of the roofline on W1 and W2, 65% on W3, and
faster than vLLM, llama.cpp and transformers on the same cores.

Engines alone: no queue, no text. Total tokens/s = (prompt + generated) / wall time. In each round
the ceilings are measured, then every engine runs each workload in turns; `roofline.py` says what a
workload takes at the ceilings, `peer_engine.py` which peers there are. First, each engine's greedy
tokens are compared with ours. `--profile` adds where the time of our steps goes (and costs some).

    python bench/cpu_engine.py [--workload W1 ...] [--rounds 3] [--requests N] [--profile]
    python bench/cpu_engine.py --peers DIRECTORY --system tokenmill vllm-f32 llamacpp-f16 [--resume]
"""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the worker sets it, before torch is loaded

from engine_runs import OURS, EngineRuns, Run
from peer_engine import PEERS, PeerEngine, end_in_order
from peer_model import peer_model
from roofline import Ceilings, measure_ceilings, need
from step_profile import StepProfile
from workloads import WORKLOADS, Workload, in_turn

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.producer.params import SamplingParams

Request = tuple[list[int], int]
OURS_INT8 = f"{OURS}-int8"
#: Least share of a peer's greedy tokens that come before the first which differs from ours.
LEAST_AGREEMENT = 0.8


class Runner(Protocol):
    """Runs requests of (prompt, tokens to generate) and returns the seconds that it took."""

    outputs: list[list[int]]

    def run(self, requests: Sequence[Request]) -> float: ...


class Ours:
    """The engine in this process; the model is loaded once, each run has an engine of its own."""

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        self.model = model
        self.profile: StepProfile | None = None
        self.budgets: list[int] = []
        self.outputs: list[list[int]] = []
        self._config = config

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds for the requests, all there at once."""
        engine = Engine(self.model, self._config)
        self.budgets.append(engine.scheduler.token_budget)
        _add(engine, 0, ([1, 2, 3], 2))
        _drain(engine, [[]])
        self.outputs = [[] for _ in requests]
        with self.profile.recording() if self.profile else nullcontext():
            started = time.perf_counter()
            for number, request in enumerate(requests):
                _add(engine, number, request)
            _drain(engine, self.outputs)
            seconds = time.perf_counter() - started
        if [len(output) for output in self.outputs] != [length for _, length in requests]:
            raise SystemExit("fewer tokens came than were asked for")
        return seconds


def _add(engine: Engine, number: int, request: Request) -> None:
    prompt, output = request
    engine.add(str(number), prompt, SamplingParams(max_tokens=output, ignore_eos=True), seed=0)


def _drain(engine: Engine, outputs: list[list[int]]) -> None:
    """Step until nothing is left."""
    while engine.has_work:
        for output in engine.step():
            outputs[int(output.seq_id)] += output.token_ids


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of the tokens before the first that differs, over all requests."""
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        differing = (n for n, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
        same += next(differing, len(mine))
    return same / sum(len(mine) for mine in ours)


def check(runners: dict[str, Runner], vocabulary: int) -> dict[str, float]:
    """How far each engine's greedy tokens agree with ours; those that compute the same must."""
    requests = [(prompt[:100], 24) for prompt, _ in WORKLOADS["W1"].prompts(vocabulary)[:8]]
    agreements = {}
    for name, runner in runners.items():
        runner.run(requests)
        agreements[name] = agreement(runners[OURS].outputs, runner.outputs)
        print(f"{name}: {agreements[name]:.1%} of the greedy tokens are ours", flush=True)
        if name in PEERS and PEERS[name].is_exact and agreements[name] < LEAST_AGREEMENT:
            raise SystemExit(f"{name} does not compute what we do")
    return agreements


def measured(
    name: str,
    runner: Runner,
    workload: Workload,
    number: int,
    spec: ModelSpec,
    ceilings: Ceilings,
) -> Run:
    """One run of a workload."""
    requests = workload.prompts(spec.vocab_size)
    seconds = runner.run(requests)
    least = need(spec, [(len(prompt), output) for prompt, output in requests]).seconds(ceilings)
    tokens = sum(len(prompt) + output for prompt, output in requests)
    return Run(name, workload.name, number, seconds, tokens / seconds, least / seconds)


def main() -> None:
    options = _options()
    end_in_order()
    workloads = [WORKLOADS[name] for name in options.workload]
    if options.requests:
        workloads = [replace(w, requests=min(w.requests, options.requests)) for w in workloads]
    config = EngineConfig(token_budget=options.token_budget)
    ours = Ours(load("smollm2", device="cpu"), config)
    if options.profile:
        _profile(ours, workloads)
        return
    name = f"cpu_engine_first_{options.requests}" if options.requests else "cpu_engine"
    runs = EngineRuns(name, resume=options.resume)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {OURS: ours}
        for system in options.system:
            if system == OURS_INT8:
                runners[system] = Ours(load("smollm2", device="cpu", quantization="int8"), config)
            elif system != OURS:
                peer = PeerEngine(PEERS[system], options.peers, peer_model())
                runners[system] = stack.enter_context(peer)
                runs.about[system] = peer.about
                print(f"{system} is up after {peer.about['start_s']:.0f} s", flush=True)
        agreement = runs.about.setdefault("agreement", {})
        agreement |= check(runners, ours.model.spec.vocab_size)
        for number in range(1, options.rounds + 1):
            _round(number, runners, ours, workloads, runs)
    print(*runs.rows(), runs.path, sep="\n")


def _round(
    number: int,
    runners: dict[str, Runner],
    ours: Ours,
    workloads: Sequence[Workload],
    runs: EngineRuns,
) -> None:
    """Every engine in turns on each workload, but what has been measured."""
    ceilings = measure_ceilings()
    runs.about.setdefault("ceilings", []).append(asdict(ceilings))
    for workload in workloads:
        for system, runner in in_turn(list(runners.items()), number):
            if (system, workload.name, number) in runs:
                continue
            run = measured(system, runner, workload, number, ours.model.spec, ceilings)
            runs.about["token_budgets"] = ours.budgets
            runs.keep(run)
            print(
                f"round {number}, {workload.name}, {system}: {run.seconds:.1f} s, "
                f"{run.tokens_per_s:.0f} tokens/s, {run.of_roofline:.1%} of the roofline "
                f"({ceilings.flops_per_s / 1e9:.0f} GFLOP/s)",
                flush=True,
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--workload", nargs="+", choices=sorted(WORKLOADS), default=["W1", "W2", "W3"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="only the first of each workload")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peers", type=Path, help="where their virtual environments lie")
    parser.add_argument("--system", nargs="+", choices=[OURS, OURS_INT8, *PEERS], default=[OURS])
    parser.add_argument("--resume", action="store_true", help="keep the runs of the result there")
    options = parser.parse_args()
    if options.peers is None and set(options.system) - {OURS, OURS_INT8}:
        parser.error("--peers is needed for other systems than ours")
    return options


def _profile(ours: Ours, workloads: Sequence[Workload]) -> None:
    for workload in workloads:
        ours.profile = StepProfile()
        ours.run(workload.prompts(ours.model.spec.vocab_size))
        print(workload.name, *ours.profile.lines(), sep="\n")


if __name__ == "__main__":
    main()
