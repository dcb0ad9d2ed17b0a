"""Claim: on one server, 16 workers do at least 0.98 of 16 times what one does; what the queue takes
of their time; and where a fleet of 1,000 meets its first limit.

Real worker processes, each around an engine that runs the real scheduler and sleeps what a step of
Llama-2-70B on 4 x A100 takes (the paper has 1.46 requests/s for one replica, 23.7 for 16), and
real clients, 16 for each worker, that follow every token. The limit of 1,000 workers is computed
from the server's CPU time at 16, and beside it from bench/results/queue_speed.json.

    python bench/replicas.py [--workers 1 2 4 8 16] [--requests 96]
"""

import argparse
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from paced_engine import PacedEngine, Spent
from page import write_section
from queue_clients import closed_loop
from queue_servers import Server, running
from workloads import RESULTS, ROOT, write_result

from tokenmill.engine.planning.device import Device
from tokenmill.engine.planning.figures import Record, Sla, figures_of
from tokenmill.engine.planning.load import ClosedLoop, Lengths
from tokenmill.engine.planning.plot import Curve, Panel, draw
from tokenmill.engine.planning.simulation import simulate
from tokenmill.producer.client import Client
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.process import run

DEVICE = "llama-2-70b-4xa100-fastgen"
CLIENTS = 16
#: Workers whose clients share one process.
WORKERS_PER_PRODUCER = 4
FLEET = 1000
HEADS = (
    "| workers | req/s | of N times one | mean latency s | between steps | server's cores "
    "| scripts/s | deltas/s |"
)
SLA = Sla(512, 4)

#: Workers and producers are forked: sixteen imports of torch would take longer than the bench.
FORK = multiprocessing.get_context("fork")


def work(url: str, device: Device, outcome: Any) -> None:
    configure(as_json=True, level=logging.WARNING)
    engines: list[PacedEngine] = []

    def make_engine(_: WorkerConfig) -> PacedEngine:
        engines.append(PacedEngine(device))
        return engines[0]

    run(WorkerConfig(model="paced", redis_url=url), make_engine=make_engine)
    outcome.put(engines[0].spent)


def produce(url: str, requests: int, workers: int, number: int, outcome: Any) -> None:
    """The clients of some workers: the same lengths for each worker, so that loads compare."""
    lengths = [pair for pair in lengths_of(requests).draw() for _ in range(workers)]
    with Client(url) as client:
        outcome.put(closed_loop(client, lengths, workers * CLIENTS, seed=number))


def measure(server: Server, device: Device, workers: int, per_worker: int) -> dict[str, Any]:
    """One number of workers, each with 16 clients."""
    spent_queue, record_queue = FORK.Queue(), FORK.Queue()
    fleet = [
        FORK.Process(target=work, args=(server.url, device, spent_queue)) for _ in range(workers)
    ]
    for process in fleet:
        process.start()
    with Client(server.url) as client:
        while len(client.workers()) < workers:
            if not all(process.is_alive() for process in fleet):
                raise SystemExit("a worker ended")
            time.sleep(0.1)
    producers = [
        FORK.Process(
            target=produce,
            args=(server.url, per_worker, share, n, record_queue),
        )
        for n, share in enumerate(shares(workers))
    ]
    cpu, scripts, began = server.cpu_s(), server.scripts_us(), time.perf_counter()
    commands = command_s(server)
    for process in producers:
        process.start()
    records: list[Record] = [r for _ in producers for r in record_queue.get(timeout=600)]
    wall_s = time.perf_counter() - began
    cpu, calls = server.cpu_s() - cpu, server.scripts_us()[0] - scripts[0]
    inside = {name: (s - commands.get(name, 0)) / wall_s for name, s in command_s(server).items()}
    for process in fleet:
        os.kill(process.pid or 0, signal.SIGTERM)
    spent: list[Spent] = [spent_queue.get(timeout=60) for _ in fleet]
    for process in (*fleet, *producers):
        process.join(20)
    server.clear()
    row = row_of(workers, records, spent, cpu / wall_s, calls / wall_s)
    # Of the server's cores: inside scripts, and inside the reads of the clients.
    return row | {"command_cores": {n: v for n, v in inside.items() if v > 0.01 * cpu / wall_s}}


def command_s(server: Server) -> dict[str, float]:
    """Seconds that the server has spent inside each command; those of a script count twice."""
    stats: Any = server.client.info("commandstats")
    return {name.removeprefix("cmdstat_"): row["usec"] / 1e6 for name, row in stats.items()}


def shares(workers: int) -> list[int]:
    """Workers whose clients are in each producer process."""
    full, rest = divmod(workers, WORKERS_PER_PRODUCER)
    return [WORKERS_PER_PRODUCER] * full + [rest] * (rest > 0)


def lengths_of(requests: int) -> Lengths:
    return Lengths(requests=requests, mean_prompt=2600, mean_output=60, max_prompt=4000, seed=42)


def row_of(
    workers: int, records: list[Record], spent: list[Spent], cores: float, scripts: float
) -> dict[str, Any]:
    figures = figures_of(records, [SLA])
    between = sum(one.between_s for one in spent)
    stepping = sum(one.stepping_s for one in spent)
    return {
        "workers": workers,
        "requests_per_s": figures.requests_per_s,
        "steady_requests_per_s": steady_rate(records),
        "figures": asdict(figures),
        "queue_share": between / (between + stepping),
        "oversleeping": stepping / sum(one.modelled_s for one in spent) - 1,
        "deltas_per_s": sum(one.tokens for one in spent) / figures.wall_s,
        "steps_per_s": sum(one.steps for one in spent) / figures.wall_s,
        "server_cores": cores,
        "server_scripts_per_s": scripts,
    }


def steady_rate(records: Sequence[Record]) -> float:
    """Requests/s until nine in ten have ended: the last ones keep no worker busy."""
    ends = sorted(record.token_times[-1] for record in records)
    most = int(0.9 * len(ends))
    return most / (ends[most - 1] - min(record.sent_s for record in records))


def fleet_limits(row: dict[str, Any], one: dict[str, float]) -> dict[str, Any]:
    """What 1,000 workers would ask of one server, as shares of what it has."""
    per_worker = row["server_cores"] / row["workers"]
    limits: dict[str, Any] = {
        "server_cores_for_1000": FLEET * per_worker,
        "workers_that_one_server_holds": 1 / per_worker,
        "deltas_per_s_of_1000": FLEET * one["output_tokens_per_s"],
        "requests_per_s_of_1000": FLEET * one["requests_per_s"],
    }
    path = RESULTS / "queue_speed.json"
    if path.exists():
        for name, server in json.loads(path.read_text())["servers"].items():
            rates = {
                "deltas in batches of 64": server["fenced_deltas"]["per_cpu_s"]["median"]
                / one["output_tokens_per_s"],
                "submits of one producer": server["submit"]["submit_many"]["median"]
                / one["requests_per_s"],
            }
            limits[f"workers by queue_speed.json, {name}"] = rates
    return limits


def planned(device: Device, requests: int) -> dict[str, float]:
    run_ = simulate(device, lengths_of(requests), ClosedLoop(CLIENTS))
    figures = figures_of(run_.records, [SLA])
    return {
        "requests_per_s": steady_rate(run_.records),
        "mean_latency_s": figures.mean_latency_s,
        "output_tokens_per_s": figures.output_tokens_per_s,
        "steps_per_s": run_.num_steps / figures.wall_s,
    }


def report(rows: list[dict[str, Any]], limits: dict[str, Any], one: dict[str, float]) -> None:
    base = rows[0]["steady_requests_per_s"] / rows[0]["workers"]
    lines = [
        HEADS,
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['workers']} | {row['steady_requests_per_s']:.2f} | "
        f"{row['steady_requests_per_s'] / base / row['workers']:.3f} | "
        f"{row['figures']['mean_latency_s']:.2f} | {row['queue_share']:.2%} | "
        f"{row['server_cores']:.3f} | {row['server_scripts_per_s']:,.0f} | "
        f"{row['deltas_per_s']:,.0f} |"
        for row in rows
    ]
    outlook = (
        f"Planned for one worker: {one['requests_per_s']:.2f} requests/s. A thousand would do "
        f"{limits['requests_per_s_of_1000']:,.0f} requests/s with "
        f"{limits['deltas_per_s_of_1000']:,.0f} streamed tokens/s, for which the server needs "
        f"{limits['server_cores_for_1000']:.1f} cores: its one thread that runs scripts is the "
        f"first limit, at {limits['workers_that_one_server_holds']:,.0f} workers. "
        "Beyond it a queue is spread over shards on several servers, or answers go whole to "
        "reply streams."
    )
    lines += ["", outlook]
    text = "\n".join(lines)
    print(text)
    curves = [
        Curve(
            label="measured",
            points=[(row["workers"], row["steady_requests_per_s"]) for row in rows],
        ),
        Curve(
            label="N times one",
            points=[(row["workers"], row["workers"] * base) for row in rows],
            colour=1,
            is_other=True,
        ),
    ]
    cores = [(float(row["workers"]), row["server_cores"]) for row in rows]
    panels = [
        Panel(title="throughput", x="workers", y="requests/s", curves=curves),
        Panel(
            title="one server",
            x="workers",
            y="cores busy",
            curves=[Curve(label="server", points=cores)],
        ),
    ]
    folder = ROOT / "docs" / "figures"
    draw(
        "Paced Llama-2-70B replicas, 16 clients each, 2600/60 tokens",
        panels,
        [folder / "replicas.svg", folder / "replicas.png"],
    )
    section = (
        f"[Result](../bench/results/replicas.json).\n\n{text}\n\n![replicas](figures/replicas.svg)"
    )
    write_section(ROOT / "docs" / "benchmarks.md", "replicas", section)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=96, help="for each worker; the paper: 256")
    parser.add_argument("--server", choices=("redis", "valkey"), default="redis")
    parser.add_argument("--try", dest="is_try", action="store_true", help="write nothing")
    options = parser.parse_args()
    device = Device.read(DEVICE)
    rows = []
    with running(options.server) as server:
        for workers in options.workers:
            rows.append(measure(server, device, workers, options.requests))
            shown = {k: v for k, v in rows[-1].items() if k != "figures"}
            print(json.dumps(shown), flush=True)
        name = server.name
    one = planned(device, options.requests)
    limits = fleet_limits(rows[-1], one)
    print(json.dumps(limits, indent=2))
    if options.is_try:
        return
    report(rows, limits, one)
    content = {"server": name, "device": DEVICE, "requests_per_worker": options.requests}
    print(write_result("replicas", None, {**content, "rows": rows, "planned": one, **limits}))


if __name__ == "__main__":
    main()
