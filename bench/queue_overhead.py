"""Claim: through Redis, the engine keeps at least 95% of its in-process rate, and a worker with its
model on disk is ready in under 8 s.

W1 on the CPU with SmolLM2, in turns: the engine alone in a process, then a worker process that is
fed through the embedded server by this one. Total tokens/s = (prompt + generated) / wall time.

    python bench/queue_overhead.py [--rounds 3] [--workload W1]
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workloads import WORKLOADS, Workload, write_result

VOCABULARY = 49152

IN_PROCESS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from workloads import WORKLOADS
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import load
from tokenmill.producer.params import SamplingParams

work = WORKLOADS[sys.argv[2]].prompts(49152)
engine = Engine(load("smollm2", device="cpu"), EngineConfig())
engine.add("warm", [1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True), seed=0)
while engine.has_work:
    engine.step()
started = time.perf_counter()
for number, (prompt, output) in enumerate(work):
    engine.add(str(number), prompt, SamplingParams(max_tokens=output, ignore_eos=True), seed=number)
generated = 0
while engine.has_work:
    generated += sum(len(o.token_ids) for o in engine.step())
print(generated, time.perf_counter() - started)
"""


def in_process(workload: Workload) -> float:
    """Total tokens/s of the engine alone."""
    environment = os.environ | {"GOMP_SPINCOUNT": "3000"}  # as the worker sets it
    command = [sys.executable, "-c", IN_PROCESS, str(Path(__file__).parent), workload.name]
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout.split()
    return rate(workload, int(out[0]), float(out[1]))


def rate(workload: Workload, generated: int, seconds: float) -> float:
    work = workload.prompts(VOCABULARY)
    expected = sum(output for _, output in work)
    if generated != expected:
        raise SystemExit(f"{generated} tokens came, {expected} were asked for")
    return (sum(len(prompt) for prompt, _ in work) + generated) / seconds


def through_redis(workload: Workload) -> tuple[float, float]:
    """(total tokens/s, seconds until the worker was ready)."""
    from tokenmill.producer.client import Client

    command = [sys.executable, "-m", "tokenmill.producer.cli", "worker", "--model", "smollm2"]
    with Client() as client:
        started = time.perf_counter()
        worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            while not client.workers():
                if worker.poll() is not None:
                    raise SystemExit(f"the worker ended with {worker.returncode}")
                time.sleep(0.02)
            ready = time.perf_counter() - started
            client.result(client.submit([1, 2, 3], max_tokens=2, ignore_eos=True), timeout_s=60)
            started = time.perf_counter()
            requests = [
                client.new_request(prompt, max_tokens=output, ignore_eos=True)
                for prompt, output in workload.prompts(VOCABULARY)
            ]
            deltas = client.follow_many(client.submit_many(requests))
            generated = sum(len(delta.token_ids) for delta in deltas)
            seconds = time.perf_counter() - started
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)
    return rate(workload, generated, seconds), ready


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="W1")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    alone, queued, ready = [], [], []
    with tempfile.TemporaryDirectory() as state:
        os.environ["TOKENMILL_STATE_DIR"] = state
        os.environ.pop("TOKENMILL_REDIS_URL", None)
        from tokenmill.producer.embedded import stop_if_idle

        for number in range(options.rounds):
            alone.append(in_process(workload))
            tokens_per_s, ready_s = through_redis(workload)
            queued.append(tokens_per_s)
            ready.append(ready_s)
            print(
                f"round {number + 1}: in process {alone[-1]:.0f} tokens/s, "
                f"through Redis {queued[-1]:.0f} tokens/s, worker ready in {ready_s:.1f} s",
                flush=True,
            )
        stop_if_idle()
    share = statistics.median(queued) / statistics.median(alone)
    figures: dict[str, object] = {
        "in_process_tokens_per_s": {"median": statistics.median(alone), "all": alone},
        "through_redis_tokens_per_s": {"median": statistics.median(queued), "all": queued},
        "share": share,
        "worker_ready_s": {"median": statistics.median(ready), "all": ready},
    }
    path = write_result(f"queue_overhead_{workload.name}", workload, figures)
    print(
        f"{workload.name}: in process {statistics.median(alone):.0f} tokens/s, through Redis "
        f"{statistics.median(queued):.0f} tokens/s ({share:.1%}), "
        f"worker ready in {statistics.median(ready):.1f} s; {path}"
    )


if __name__ == "__main__":
    main()
