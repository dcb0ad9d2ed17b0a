"""Claim: the queue costs far less than the tokens it carries, and less than other queues.

On each server in turn, with an append-only file (everysec):

    deltas     fenced deltas per second of server time, in batches of 64        aim 60,000
    submit     requests/s that one producer submits                             aim 20,000
    no-op      requests/s from submit to result at the producer, one producer   aim 5 x the best
               process and one worker process, beside RQ, arq, taskiq-redis,    peer
               Dramatiq and Celery
    latency    of a request on an idle queue: until its work begins, and until  aim p95 2.5 ms
               its result is at the producer
    memory     bytes of a waiting and of a finished request, with a stream of its own or by one
               reply stream

    python bench/queue_speed.py --peer-python PATH --arq-python PATH [--server redis|valkey]

The peers run from virtual environments of their own, made of bench/peers/queue.txt and, as arq
needs an older client library, bench/peers/queue_arq.txt. Each is set up for speed, in its file
under bench/peers/queue, and none is asked for more than a result that its producer can read. The
systems take turns by the round, another one first each time; a ratio is one of a round.
(The file is not called queue.py: beside it no other bench could import Python's `queue`.)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import queue_protocol as protocol
from queue_servers import Server, running
from workloads import in_turn, write_result

OURS = "tokenmill, "
APPS = Path(__file__).resolve().parent / "peers" / "queue"


@dataclass(frozen=True)
class System:
    """A queue under test: its file, its interpreter, and how many jobs make a round."""

    name: str
    app: str
    python: str
    jobs: int
    environment: tuple[tuple[str, str], ...] = ()


def systems(options: argparse.Namespace) -> list[System]:
    peer, arq = options.peer_python, options.arq_python
    chosen = [
        System(f"{OURS}{name}", "tokenmill_app.py", sys.executable, 8000, environment)
        for name in ("result", "stream")
        for environment in ((("PEER_DELIVERY", name),),)
    ]
    if arq:
        chosen.append(System("arq", "arq_peer.py", arq, 2000))
    if peer:
        chosen += [
            System("RQ", "rq_peer.py", peer, 400),
            System("taskiq-redis", "taskiq_peer.py", peer, 2000),
            System("Dramatiq", "dramatiq_peer.py", peer, 2000),
            System("Celery", "celery_peer.py", peer, 1000),
        ]
    return chosen


class Producer:
    """The producer process of a system, which does what it is asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, kind: str, number: int) -> Any:
        """Have it run a round of jobs, or probe the latency; it checks every answer itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"kind": kind, "number": number}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a producer ended with {self._process.wait()}; see above")
        return json.loads(line)


@contextmanager
def started(system: System, url: str) -> Iterator[Producer]:
    """A worker process and a producer process of a system."""
    paths = [str(APPS)]
    if system.python == sys.executable:
        paths.append(os.environ.get("PYTHONPATH", ""))
    environment = os.environ | dict(system.environment)
    environment |= {"PEER_URL": url, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [system.python, str(APPS / system.app)]
    with (
        subprocess.Popen(
            [*command, "worker", url],
            cwd=APPS,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as worker,
        subprocess.Popen(
            [*command, "produce", url],
            cwd=APPS,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as producer,
    ):
        try:
            yield Producer(producer)
        finally:
            producer.kill()
            worker.terminate()
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()


def end_to_end(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Every system started in each round, and ended before the next: only one runs at a time."""
    chosen = systems(options)
    rounds: list[dict[str, float]] = []
    probes: dict[str, list[dict[str, list[float]]]] = {system.name: [] for system in chosen}
    for number in range(options.rounds):
        rates = {}
        for system in in_turn(chosen, number):
            with started(system, server.url) as producer:
                seconds = producer.ask("round", system.jobs)["total_s"]
                probes[system.name].append(
                    producer.ask("probe", -(-options.probes // options.rounds))
                )
            server.clear()
            rates[system.name] = system.jobs / seconds
            print(f"  round {number + 1}, {system.name}: {rates[system.name]:,.0f}", flush=True)
        rounds.append(rates)
    return {
        "systems": {
            system.name: {
                "jobs_a_round": system.jobs,
                "requests_per_s": spread([rates[system.name] for rates in rounds]),
                **{
                    name: percentiles([ms for reply in probes[system.name] for ms in reply[name]])
                    for name in ("started_ms", "finished_ms")
                },
            }
            for system in chosen
        },
        "times_the_best_peer": ratios(rounds),
    }


def ratios(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of each of ours: its rate over that of the best peer of the same round."""
    own = [name for name in rounds[0] if name.startswith(OURS)]
    if len(own) == len(rounds[0]):
        return {}
    best = [max(rate for name, rate in rates.items() if name not in own) for rates in rounds]
    return {
        name: spread([rates[name] / rate for rates, rate in zip(rounds, best, strict=True)])
        for name in own
    }


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "all": values}


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    chosen = {f"p{p}": ordered[int((len(ordered) - 1) * p / 100)] for p in (50, 95, 99)}
    return {**chosen, "probes": len(ordered)}


def repeated(rounds: list[dict[str, float]]) -> dict[str, Any]:
    return {name: spread([item[name] for item in rounds]) for name in rounds[0]}


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    protocol.check(server)
    count = range(options.rounds)
    figures: dict[str, Any] = {
        "fenced_deltas": repeated([protocol.fenced_deltas(server, batches=200) for _ in count]),
        "submit": repeated([protocol.submits(server, requests=10_000) for _ in count]),
        "memory_bytes": {
            "stream": protocol.memory(server, requests=2000),
            "result": protocol.memory(server, requests=2000, reply_to="bench"),
        },
    }
    show_own(server.name, figures)
    found = end_to_end(server, options)
    figures["no_op"] = found["systems"]
    figures["times_the_best_peer"] = found["times_the_best_peer"]
    show_systems(found)
    return figures


def show_own(name: str, figures: dict[str, Any]) -> None:
    deltas, submit = figures["fenced_deltas"], figures["submit"]
    size = {f"{k} ({d})": v for d, row in figures["memory_bytes"].items() for k, v in row.items()}
    print(f"\n{name}")
    print(
        f"  fenced deltas/s of server time: {deltas['per_script_s']['median']:,.0f} in the script, "
        f"{deltas['per_cpu_s']['median']:,.0f} of the server's CPU; "
        f"wall {deltas['per_wall_s']['median']:,.0f}"
    )
    print(
        f"  submit_many: {submit['submit_many']['median']:,.0f} requests/s, with new_request "
        f"{submit['with_new_request']['median']:,.0f}"
    )
    sizes = ", ".join(f"{name} {value:,.0f}" for name, value in size.items())
    print(f"  bytes a request of 260 + 60 tokens: {sizes}", flush=True)


def show_systems(found: Mapping[str, Any]) -> None:
    print("  no-op requests        req/s (all rounds)     began p50/p95 ms   result p50/p95 ms")
    for name, row in found["systems"].items():
        show(name, row)
    for name, times in found["times_the_best_peer"].items():
        every = " ".join(f"{value:.1f}" for value in times["all"])
        print(f"  {name}: {times['median']:.1f} times the best peer of a round ({every})")


def show(name: str, row: dict[str, Any]) -> None:
    rate, began, done = row["requests_per_s"], row["started_ms"], row["finished_ms"]
    every = " ".join(f"{value:.0f}" for value in rate["all"])
    print(
        f"  {name:18s} {rate['median']:8,.0f} ({every})   {began['p50']:6.2f} {began['p95']:6.2f}"
        f"   {done['p50']:6.2f} {done['p95']:6.2f}"
    )


def versions(options: argparse.Namespace) -> dict[str, str]:
    """What is installed beside the peers."""
    names = "arq rq taskiq taskiq-redis dramatiq celery redis hiredis uvloop"
    code = (
        "import json, importlib.metadata as m; have = {d.name.lower(): d.version for d in "
        f"m.distributions()}}; print(json.dumps({{n: have[n] for n in '{names}'.split() "
        "if n in have}))"
    )
    found: dict[str, str] = {}
    for label, python in (("peers", options.peer_python), ("arq", options.arq_python)):
        if python:
            done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
            found |= {f"{label}: {n}": v for n, v in json.loads(done.stdout).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="interpreter with bench/peers/queue.txt")
    parser.add_argument("--arq-python", help="interpreter with bench/peers/queue_arq.txt")
    parser.add_argument("--server", choices=("redis", "valkey"), help="only this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--probes", type=int, default=200)
    options = parser.parse_args()
    began = time.monotonic()
    figures: dict[str, Any] = {}
    for kind in (options.server,) if options.server else ("redis", "valkey"):
        with running(kind) as server:
            figures[server.name] = measure(server, options)
    content: dict[str, object] = {"servers": figures, "peers": versions(options)}
    path = write_result("queue_speed", None, content)
    print(f"\n{path} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
