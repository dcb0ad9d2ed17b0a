"""Claim: in one engine, Dynamic SplitFuse against prefill-first and static batching: effective
throughput at the middle SLA at least 2.3 times where they differ most, token gap P95 at least 3.7
times lower, mean latency at equal load lower; and the planner says it within 10%.

The paper's benchmark at a fifth of its lengths, on the CPU: closed loops of clients through Redis,
one worker process for each policy. Cases of 240/12 and 520/26 tokens, and 100/100 and 100/200,
which the paper's system lost. Each worker first runs a short load of other lengths: from its steps
come the cost model and the predictions that stand beside the measurements. Then the policies take
turns at each number of clients, another one first each time; who has no work only waits for it.

    python bench/splitfuse.py [--case 240/12 ...] [--clients 1 2 4 8 16 32] [--quick] [--try]

After each case it writes bench/results/splitfuse.json, docs/figures/splitfuse-*.svg and .png, and
the tables of docs/benchmarks.md.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_engine import end_in_order
from queue_clients import closed_loop
from queue_servers import running
from splitfuse_report import Load, write_page
from workloads import ROOT, in_turn, provenance, write_result

from tokenmill.engine.cost_model import CostModel, Timing, kv_tokens_read
from tokenmill.engine.planning.device import Device, EngineShape
from tokenmill.engine.planning.figures import Sla, figures_of
from tokenmill.engine.planning.load import ClosedLoop, Lengths
from tokenmill.engine.planning.simulation import simulate
from tokenmill.engine.planning.step_cost import StepCost
from tokenmill.engine.scheduler import Policy
from tokenmill.producer.client import Client

#: Prompt and output tokens, and the numbers of clients.
CASES = {
    "240/12": (1, 2, 4, 8, 16, 32),
    "520/26": (1, 2, 4, 8, 16),
    "100/100": (4, 16),
    "100/200": (4, 16),
}
#: Static batches, which nobody would choose, are measured at these alone; so is all of --quick.
FEW_CLIENTS = (4, 16)
#: SLAs of the CPU's scale.
SLAS = (Sla(128, 1), Sla(128, 2), Sla(128, 4))
#: Of splitfuse: a fifth of the paper's 768, as a multiple of 64.
BUDGET = 192
#: A fifth of vLLM's 4,096 tokens of a step in 2023; static batches have the same.
PREFILL_BUDGET = 820
#: What the costs are learnt from: other lengths than any case, and few enough to be quick.
WARM_UP, WARM_UP_CLIENTS = Lengths(requests=12, mean_prompt=330, mean_output=24, seed=7), 6


@dataclass
class Worker:
    """A worker process, its queue, and the steps that it wrote down."""

    policy: Policy
    client: Client
    file: Path
    process: subprocess.Popen[bytes]
    seen: int = 0

    def steps(self) -> list[dict[str, Any]]:
        """The steps since the last call."""
        lines = self.file.read_text().splitlines()[1:]
        fresh, self.seen = lines[self.seen :], len(lines)
        return [json.loads(line) for line in fresh]

    def engine(self) -> EngineShape:
        about = json.loads(self.file.read_text().splitlines()[0])
        return EngineShape(policy=self.policy, **about)


@contextmanager
def worker(url: str, policy: Policy, options: argparse.Namespace) -> Iterator[Worker]:
    """A worker that is ready, with a queue of its own."""
    budget = options.token_budget if policy is Policy.SPLITFUSE else PREFILL_BUDGET
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("timed_worker.py")), url]
        command += [policy.value, str(file), "--policy", policy.value]
        command += ["--token-budget", str(budget)]
        if policy is Policy.SPLITFUSE and options.max_step_ms is not None:
            command += ["--max-step-ms", str(options.max_step_ms)]
        process = subprocess.Popen(command)
        try:
            with Client(url, queue=policy.value) as client:
                while not client.workers():
                    if process.poll() is not None:
                        raise SystemExit(f"the worker ended with {process.returncode}")
                    time.sleep(0.05)
                yield Worker(policy, client, file, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def device_of(serving: Worker, steps: Sequence[dict[str, Any]]) -> tuple[Device, float]:
    """The device as its steps show it, and the median relative error of the fit."""
    model = CostModel()
    model.probe(
        Timing(
            sum(length for _, length in step["chunks"]),
            sum(kv_tokens_read(*chunk) for chunk in step["chunks"]),
            step["seconds"],
        )
        for step in steps
        if step["chunks"]
    )
    about = provenance()
    device = Device(
        cost=StepCost.of_fit(model.fit),
        engine=serving.engine(),
        device=f"SmolLM2-135M, float32, on {about['cpu']}",
        source=f"{len(steps)} steps of bench/splitfuse.py at {about['commit']}, {about['date']}; "
        f"median error {model.fit.relative_error:.1%}",
    )
    return device, model.fit.relative_error


def requests_of(clients: int, options: argparse.Namespace) -> int:
    wanted: int = options.requests_per_client * clients
    return max(int(options.least_requests), wanted)


def learn(serving: Worker) -> tuple[Device, float]:
    """`device_of` a short load."""
    closed_loop(serving.client, WARM_UP.draw()[:4], WARM_UP_CLIENTS)
    serving.steps()  # the first run of anything is not what it is later
    closed_loop(serving.client, WARM_UP.draw(), WARM_UP_CLIENTS)
    return device_of(serving, serving.steps())


def run_case(
    workers: Sequence[tuple[Worker, Device]], case: str, options: argparse.Namespace
) -> dict[str, list[Load]]:
    """The loads of each policy, which take turns at each number of clients."""
    loads: dict[str, list[Load]] = {serving.policy.value: [] for serving, _ in workers}
    for turn, clients in enumerate(options.clients or CASES[case]):
        for serving, device in in_turn(workers, turn):
            if is_chosen(serving.policy, clients, options):
                load = run_load(serving, device, case, clients, options)
                loads[serving.policy.value].append(load)
                show(serving.policy, case, load)
    return loads


def is_chosen(policy: Policy, clients: int, options: argparse.Namespace) -> bool:
    is_few = options.quick or (policy is Policy.STATIC and not options.clients)
    return clients in FEW_CLIENTS or not is_few


def run_load(
    serving: Worker, device: Device, case: str, clients: int, options: argparse.Namespace
) -> Load:
    prompt, output = map(int, case.split("/"))
    lengths = Lengths(
        requests=requests_of(clients, options), mean_prompt=prompt, mean_output=output, seed=42
    )
    measured = figures_of(closed_loop(serving.client, lengths.draw(), clients, seed=clients), SLAS)
    predicted = figures_of(simulate(device, lengths, ClosedLoop(clients)).records, SLAS)
    return Load(clients, measured, predicted, serving.steps())


def show(policy: Policy, case: str, load: Load) -> None:
    seen = load.measured
    rate, latency = load.off()
    effective = "/".join(f"{value:.2f}" for value in seen.effective_per_s)
    what = f"{case:8s} {policy.value:13s} {load.clients:3d} clients, {seen.requests:3d} requests"
    print(
        f"{what} in {seen.wall_s:3.0f} s: {seen.requests_per_s:.2f} req/s, "
        f"latency {seen.mean_latency_s:.2f} s, "
        f"gap P50/P95 {seen.token_gap_s[0]:.3f}/{seen.token_gap_s[2]:.3f}, effective {effective}; "
        f"planned {rate:+.0%} req/s, {latency:+.0%} latency",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--clients", nargs="+", type=int, help="instead of each case's own")
    parser.add_argument("--quick", action="store_true", help=f"only {FEW_CLIENTS} clients")
    parser.add_argument("--policy", nargs="+", type=Policy, default=list(Policy))
    parser.add_argument("--requests-per-client", type=int, default=2)
    parser.add_argument("--least-requests", type=int, default=10)
    parser.add_argument("--token-budget", type=int, default=BUDGET, help="of splitfuse")
    parser.add_argument("--max-step-ms", type=float, help="of splitfuse, as a worker's")
    parser.add_argument("--server", choices=("redis", "valkey"), default="redis")
    parser.add_argument("--save-device", type=Path, help="as JSON, for `tokenmill plan --device`")
    parser.add_argument("--try", dest="is_try", action="store_true", help="write nothing")
    options = parser.parse_args()
    end_in_order()
    began = time.monotonic()
    loads: dict[str, dict[str, list[Load]]] = {}
    engines: dict[str, Any] = {}
    with running(options.server) as server, ExitStack() as stack:
        workers = []
        for policy in options.policy:
            serving = stack.enter_context(worker(server.url, policy, options))
            device, error = learn(serving)
            workers.append((serving, device))
            engines[policy.value] = {**device.to_mapping(), "fit_error": error}
            if options.save_device and policy is Policy.SPLITFUSE:
                options.save_device.write_text(json.dumps(device.to_mapping(), indent=2) + "\n")
            print(f"{policy.value}: {device.engine}, {device.cost}, error {error:.1%}")
        content = {"server": server.name, "engines": engines, "slas": [str(sla) for sla in SLAS]}
        for case in options.case:
            loads[case] = run_case(workers, case, options)
            write(loads, content, is_try=options.is_try)
            print(f"{time.monotonic() - began:.0f} s", flush=True)


def write(
    loads: Mapping[str, Mapping[str, Sequence[Load]]],
    content: Mapping[str, Any],
    *,
    is_try: bool,
) -> None:
    """The page and the result of what there is."""
    figures = write_page(loads, SLAS, content, folder=None if is_try else ROOT / "docs")
    if not is_try:
        print(write_result("splitfuse", None, {**content, **figures}))


if __name__ == "__main__":
    main()
