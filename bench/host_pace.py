"""Claim: the host of a worker keeps up with a GPU: at least 97% of the time of a steady run, a
device as fast as an H100 should be has a step to compute.

There is no GPU in this bench. The real worker, scheduler, device rows, tokenizer and server run;
instead of the decoder a step takes the time that the roofline of Qwen3-0.6B gives on an H100 at 85%
of 3.0 TB/s and 560 TFLOP/s, behind the step before it. The model's parts on the device and the
launches of kernels are left out: what is measured is everything else that a host does. The requests
are those of the reference workload (256, prompts and outputs uniform in 100-1024), twice over,
queued before the worker starts; busy is counted while there are at least as many left as rows.

    python bench/host_pace.py [--rounds 3] [--requests 512]
"""

import argparse
import logging
import multiprocessing
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_device import QWEN3_06B, tiny
from queue_servers import Server, running
from workloads import write_result

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.copies import Tensors, Wait
from tokenmill.engine.device_executor import DeviceExecutor, Launch
from tokenmill.engine.engine import Engine
from tokenmill.engine.executor import Ticket
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.weights import empty_weights, pack, random_weights
from tokenmill.engine.scheduler import SchedulerOutput
from tokenmill.producer.client import Client
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.process import run

FORK = multiprocessing.get_context("fork")
#: Of an H100, as it should be reached: bytes and operations a second.
BYTES_PER_S, FLOPS_PER_S = 0.85 * 3.0e12, 560e12
#: Of Qwen3-0.6B in bfloat16: bytes of weights, operations for a token, bytes of a token's KV.
WEIGHTS, FLOPS, KV = 1.2e9, 0.88e9, 2 * 2 * 28 * 8 * 128
#: What no roofline has: some three hundred kernels' tails.
FIXED_S = 0.5e-3
ROWS = 256


@dataclass
class Device:
    """When it was busy, and its launches: what `wait` sleeps for."""

    free_at: float = 0.0
    step_s: float = 0.0
    #: Of steps: (launched at, began at, ended at, rows).
    steps: list[tuple[float, float, float, int]] = field(default_factory=list)

    def submit(self, work: Callable[[], Tensors]) -> Wait:
        """The next step begins now, or when the one before it ends."""
        found, now = work(), time.perf_counter()
        began = max(now, self.free_at)
        ended = self.free_at = began + self.step_s
        self.steps.append((now, began, ended, len(found[0])))

        def wait() -> Tensors:
            time.sleep(max(ended - time.perf_counter(), 0.0))
            return found

        return wait


class PacedExecutor(DeviceExecutor):
    """All of the executor that runs on the host."""

    def __init__(self, *args: Any, device: Device, vocabulary: int, **kwargs: Any) -> None:
        super().__init__(*args, stream=device, **kwargs)
        self._device, self._vocabulary = device, vocabulary
        self._draw = random.Random(0)

    def launch(self, plan: SchedulerOutput, started: float) -> Ticket:
        read = WEIGHTS + KV * sum(chunk.start + chunk.length for chunk in plan.chunks)
        self._device.step_s = FIXED_S + max(
            read / BYTES_PER_S, plan.num_tokens * FLOPS / FLOPS_PER_S
        )
        return super().launch(plan, started)

    def _compute(self, launch: Launch) -> Tensors:
        first = self._draw.randrange(1000, self._vocabulary - ROWS)
        return (torch.arange(first, first + launch.num_seqs),)


def paced_engine(device: Device, config: EngineConfig) -> Engine:
    """The engine of a tiny model with a real tokenizer."""
    real = load("smollm2", device="cpu")
    shapes = tiny(QWEN3_06B) | {"vocab_size": real.spec.vocab_size, "num_hidden_layers": 1}
    spec = spec_from_config(shapes)
    weights = empty_weights(spec, torch.float32, real.device)
    random_weights(weights, seed=0)
    model = LoadedModel("paced", spec, pack(weights), real.tokenizer, real.device, torch.float32)
    engine = Engine(model, config)
    engine._executor = PacedExecutor(  # noqa: SLF001 - the seam for another would be for this alone
        engine._runner,  # noqa: SLF001
        model.tokenizer,
        {},
        max_num_seqs=ROWS,
        device=device,
        vocabulary=spec.vocab_size,
    )
    engine._num_ahead = 1  # noqa: SLF001
    return engine


def work(url: str, outcome: Any) -> None:
    """A worker's process."""
    configure(as_json=True, level=logging.WARNING)
    torch.set_num_threads(1)
    before = time.process_time()
    device = Device()
    size = EngineConfig(
        max_model_len=2304,
        token_budget=2048,
        max_num_seqs=ROWS,
        block_size=64,
        kv_cache_memory=ROWS * 2304 * 2 * 4 * 16,
    )
    config = WorkerConfig(model="paced", redis_url=url, engine=size)
    run(config, make_engine=lambda _: paced_engine(device, size))
    outcome.put((device.steps, time.process_time() - before))


def requests_of(count: int) -> list[tuple[list[int], int]]:
    draw = random.Random(0)
    return [
        ([draw.randrange(40_000) for _ in range(draw.randint(100, 1024))], draw.randint(100, 1024))
        for _ in range(count)
    ]


def follow(url: str, ids: list[str]) -> None:
    """A producer that reads every token as it comes."""
    with Client(url) as client:
        left = set(ids)
        follower = client.follower()
        for request_id in ids:
            follower.add(request_id)
        while left:
            left -= {d.request_id for d in follower.poll(1.0) if d.finish_reason}


def measure(server: Server, count: int, *, is_followed: bool) -> dict[str, float]:
    """One run; seconds and shares."""
    server.clear()
    requests = requests_of(count)
    outcome = FORK.Queue()
    with Client(server.url) as client:
        ids = [client.submit(ids, max_tokens=n, ignore_eos=True) for ids, n in requests]
        reader = FORK.Process(target=follow, args=(server.url, ids))
        if is_followed:
            reader.start()
        worker = FORK.Process(target=work, args=(server.url, outcome))
        worker.start()
        for request_id, (_, length) in zip(ids, requests, strict=True):
            result = client.result(request_id, timeout_s=600)
            if len(result.token_ids) != length:
                raise SystemExit(f"expected {length} tokens, got {len(result.token_ids)}")
    os.kill(worker.pid or 0, signal.SIGTERM)
    steps, cpu_s = outcome.get(timeout=60)
    worker.join(20)
    if is_followed:
        reader.join(20)
    return figures_of(steps, cpu_s)


def figures_of(steps: list[tuple[float, float, float, int]], cpu_s: float) -> dict[str, float]:
    """Of the steady part: from ten steps behind the first nearly full one to the last of them."""
    full = [n for n, step in enumerate(steps) if step[3] > 0.8 * ROWS]
    steady = steps[full[0] + 10 : full[-1]]
    wall = steady[-1][2] - steady[0][1]
    busy = sum(ended - began for _, began, ended, _ in steady)
    tokens = sum(rows for *_, rows in steady)
    return {
        "steps": len(steady),
        "busy": busy / wall,
        "device_tokens_per_s": tokens / busy,
        "tokens_per_s": tokens / wall,
        "step_ms": 1e3 * statistics.median(e - b for _, b, e, _ in steady),
        "worker_cpu_share": cpu_s / (steps[-1][2] - steps[0][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=512)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    with running("valkey") as server:
        for _ in range(options.rounds):
            for name, is_followed in (("queued", False), ("followed", True)):
                figures = measure(server, options.requests, is_followed=is_followed)
                found.setdefault(name, []).append(figures)
                print(name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    for name, figures in medians.items():
        spread = [round(run["busy"], 3) for run in found[name]]
        print(
            f"{name}: device busy {figures['busy']:.1%} {spread}, "
            f"{figures['tokens_per_s']:.0f} output tokens/s"
        )
    write_result(
        "host_pace", None, {"requests": options.requests, "medians": medians, "runs": found}
    )


if __name__ == "__main__":
    main()
