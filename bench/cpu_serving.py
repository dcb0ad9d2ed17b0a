"""Claim: under a closed loop on a CPU, with steps bounded from the terms of service, tokenmill
through Redis meets the terms for at least 1.3 times as many requests a second as vLLM at the best
of its token budgets (r = 4), and the token gap P95 at 16 clients is under 0.25 s.

1 to 16 clients, 64 requests of 260 prompt and 60 output tokens (normal, deviation 0.3 x mean),
random token ids, ends ignored. tokenmill: a worker, the embedded server, `Client`. vLLM: its OpenAI
server, streaming, chunked prefill, each of --budgets. All services take turns at each number of
clients, another one first each time. First, greedy tokens of both are compared.

    python bench/cpu_serving.py --peers DIRECTORY [--clients 1 2 4 8 16] [--requests 64]
        [--budgets 64 128 256 512] [--max-step-ms 150] [--dtype float32] [--resume]
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from closed_loop import RATES, Point, measure
from cpu_engine import LEAST_AGREEMENT, agreement
from kept_result import kept_result
from peer_engine import end_in_order
from peer_model import peer_model
from workloads import Workload, in_turn, write_result

if TYPE_CHECKING:
    from services import Service

VOCABULARY = 49152
NAME = "cpu_serving"


def main() -> None:
    options = _options()
    end_in_order()
    workload = Workload("closed loop", options.requests, 260, 60)
    requests = workload.prompts(VOCABULARY)
    kept = kept_result(NAME, workload) if options.resume else {}
    points = [Point(**point) for point in kept.get("points", [])]
    done = {(point.service, point.clients) for point in points}
    with tempfile.TemporaryDirectory() as state, ExitStack() as stack:
        os.environ["TOKENMILL_STATE_DIR"] = state
        os.environ.pop("TOKENMILL_REDIS_URL", None)
        services = _started(options, stack)
        _check(services)
        for turn, clients in enumerate(options.clients):
            for service in in_turn(services, turn):
                if (service.name, clients) in done:
                    continue
                with service.running():
                    points.append(measure(service.name, service.connect, requests, clients))
                print(points[-1], flush=True)
                path = write_result(NAME, workload, _figures(points))
    print(*sorted(points, key=lambda point: point.clients), *_summary(points), path, sep="\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--max-step-ms", type=float, nargs="+", default=[150.0])
    parser.add_argument("--peers", type=Path, help="where their virtual environments lie")
    parser.add_argument("--environment", default="vllm", choices=["vllm", "vllm-zen"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--eager", action="store_true", help="vLLM uncompiled: starts sooner")
    parser.add_argument("--resume", action="store_true", help="keep the points of the result there")
    return parser.parse_args()


def _started(options: argparse.Namespace, stack: ExitStack) -> list["Service"]:
    from services import VLLM, Tokenmill

    services: list[Service] = []
    for milliseconds in options.max_step_ms:
        service = Tokenmill(milliseconds)
        services.append(service)
        stack.callback(service.close)
    if options.peers:
        for budget in options.budgets:
            peer = VLLM(
                options.peers,
                peer_model().hugging_face,
                budget=budget,
                dtype=options.dtype,
                environment=options.environment,
                is_eager=options.eager,
            )
            stack.callback(peer.close)
            services.append(peer)
            print(f"{peer.name} is up", flush=True)
    return services


def _check(services: Sequence["Service"]) -> None:
    """The same greedy tokens, but for rounding."""
    requests = [(prompt, 16) for prompt, _ in Workload("check", 4, 100, 16).prompts(VOCABULARY)]
    outputs = []
    for service in services:
        with service.running(), service.connect() as stream:
            outputs.append([[t for part in stream(request) for t in part] for request in requests])
        same = agreement(outputs[0], outputs[-1])
        print(f"{service.name}: {same:.1%} of the greedy tokens are ours", flush=True)
        if same < LEAST_AGREEMENT and "bfloat16" not in service.name:
            raise SystemExit(f"{service.name} does not compute what we do")


def _figures(points: Sequence[Point]) -> dict[str, object]:
    return {"rates": RATES, "summary": _summary(points), "points": [asdict(p) for p in points]}


def _summary(points: Sequence[Point]) -> list[str]:
    """Ours against the best of vLLM's budgets, for each number of clients and each r."""
    lines = []
    for clients in sorted({point.clients for point in points}):
        here = [point for point in points if point.clients == clients]
        ours = [p.effective_requests_per_s for p in here if p.service.startswith("tokenmill")]
        theirs = [p.effective_requests_per_s for p in here if p.service.startswith("vllm")]
        if not ours or not theirs:
            continue
        pairs = [
            (rate, max(e[i] for e in ours), max(e[i] for e in theirs))
            for i, rate in enumerate(RATES)
        ]
        told = [
            f"r={rate}: {mine:.2f} against {best:.2f}" + (f" ({mine / best:.2f}x)" if best else "")
            for rate, mine, best in pairs
        ]
        lines.append(f"{clients} clients, effective requests/s, {'; '.join(told)}")
    return lines


if __name__ == "__main__":
    main()
