"""Claim: with the model on disk, `tokenmill generate` gives its first token within 4 s of its
start, and ends W1 in half the wall time of the best peer.

Wall time from the start of a process to the first token and to the last answer of W1, everything
that a user waits for included: the embedded server and the worker; a peer's imports and its load.
Each engine is a process that starts, runs W1 once and ends, in turns. vLLM as it starts fastest:
eager, and compiled with VLLM_USE_AOT_COMPILE=0 and a cache that bench/cpu_engine.py has warmed.
The answers of all are compared.

    python bench/cold_start.py [--peers DIRECTORY] [--system tokenmill llamacpp-f16 ...]
        [--rounds 3] [--requests 48] [--resume]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import redis
from kept_result import kept_result
from peer_engine import Peer, vllm_variables
from peer_model import peer_model
from workloads import RESULTS, WORKLOADS, in_turn, write_result

from tokenmill.engine.tokenizer import tokenizer_from_directory
from tokenmill.producer.connection import connect

VOCABULARY = 49152
NAME = "cold_start"
OURS = "tokenmill"
_VLLM = ("--cold", "--dtype", "float32")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("vllm-eager", "vllm", "vllm", "hf", (*_VLLM, "--eager")),
        Peer("vllm-compiled", "vllm", "vllm", "hf", _VLLM),
        Peer("llamacpp-f16", "llamacpp", "llamacpp", "f16", ("--cold",)),
    )
}
Request = tuple[list[int], int]
#: Answers that begin with so many equal characters are alike; so many of them must be.
ALIKE_CHARS, LEAST_ALIKE = 16, 0.75


@dataclass(frozen=True, slots=True)
class Start:
    """One cold start: seconds from the start of the process."""

    system: str
    round: int
    first_token_s: float
    last_answer_s: float


@dataclass(frozen=True, slots=True)
class Cold:
    """What a cold start gave."""

    first_token_s: float
    last_answer_s: float
    answers: list[str]


def ours(requests: Sequence[Request], directory: Path) -> Cold:
    """`tokenmill generate` with a server and a worker of its own."""
    rows, answers = directory / "rows.jsonl", directory / "answers.jsonl"
    lines = [
        json.dumps({"prompt": prompt, "max_tokens": length, "ignore_eos": True})
        for prompt, length in requests
    ]
    rows.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "tokenmill.producer.cli", "generate", str(rows)]
    command += ["--output", str(answers), "--model", "smollm2"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("TOKENMILL_")}
    environment |= {"TOKENMILL_STATE_DIR": str(directory / "state")}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        first = _first_stream(directory / "state", process) - started
        process.wait()
        last = time.perf_counter() - started
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    lengths = [row["usage"]["completion_tokens"] for row in found]
    if process.returncode or lengths != [length for _, length in requests]:
        raise SystemExit(f"tokenmill generate ended with {process.returncode}: {lengths} tokens")
    return Cold(first, last, [row["answer"] for row in found])


def _first_stream(state: Path, process: subprocess.Popen[bytes]) -> float:
    """When the first token stream appeared on the embedded server, looked for every 10 ms."""
    while process.poll() is None:
        with suppress(redis.RedisError, OSError):
            for socket in state.glob("**/*.sock"):
                with connect(f"unix://{socket}") as server:
                    while process.poll() is None:
                        if next(server.scan_iter("*:o:*", count=1000), None):
                            return time.perf_counter()
                        time.sleep(0.01)
        time.sleep(0.01)
    raise SystemExit("tokenmill generate ended without a token")


def theirs(peer: Peer, requests: Sequence[Request], directory: Path, environments: Path) -> Cold:
    """A peer's process, from its start to its last answer."""
    workload = directory / "workload.json"
    workload.write_text(json.dumps(requests))
    variables = vllm_variables(environments) if peer.runner == "vllm" else {}
    command = peer.command(environments, peer_model())
    first = last = 0.0
    outputs: list[list[int]] = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **variables, **peer.variables},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"path": str(workload)}) + "\n")
        process.stdin.close()
        for line in process.stdout:
            reply = json.loads(line)
            if "first" in reply:
                first = time.perf_counter() - started
            elif "outputs" in reply:
                last, outputs = time.perf_counter() - started, reply["outputs"]
    if not outputs:
        raise SystemExit(f"{peer.name} ended with {process.returncode} and no answers")
    tokenizer = tokenizer_from_directory(peer_model().hugging_face)
    return Cold(first, last, [tokenizer.decode(ids) for ids in outputs])


def alike(texts: Sequence[str], others: Sequence[str]) -> float:
    """Share of the answers that begin alike: later, rounding may lead them apart."""
    pairs = zip(texts, others, strict=True)
    return statistics.mean(a[:ALIKE_CHARS] == b[:ALIKE_CHARS] for a, b in pairs)


def main() -> None:
    options = _options()
    workload = replace(WORKLOADS["W1"], requests=options.requests)
    requests = workload.prompts(VOCABULARY)
    peer_model()  # written before anything is timed
    kept = kept_result(NAME, workload) if options.resume else {}
    starts = [Start(**start) for start in kept.get("starts", [])]
    done = {(start.system, start.round) for start in starts}
    reference: list[str] = []
    for number in range(1, options.rounds + 1):
        for system in in_turn(options.system, number):
            if (system, number) in done:
                continue
            with tempfile.TemporaryDirectory() as place:
                if system == OURS:
                    cold = ours(requests, Path(place))
                else:
                    cold = theirs(PEERS[system], requests, Path(place), options.peers)
            reference = reference or cold.answers
            share = alike(reference, cold.answers)
            starts.append(Start(system, number, cold.first_token_s, cold.last_answer_s))
            write_result(NAME, workload, {"systems": _summary(starts), "starts": _plain(starts)})
            print(
                f"round {number}, {system}: first token after {cold.first_token_s:.1f} s, "
                f"last answer after {cold.last_answer_s:.1f} s, {share:.0%} of the answers alike",
                flush=True,
            )
            if share < LEAST_ALIKE:
                raise SystemExit(f"{system} does not compute what the others do")
    for system, row in _summary(starts).items():
        print(
            f"{system:16} first token {row['first_token_s']:6.1f} s, "
            f"last answer {row['last_answer_s']:6.1f} s ({row['rounds']} rounds)"
        )
    print(RESULTS / f"{NAME}.json")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=WORKLOADS["W1"].requests)
    parser.add_argument("--peers", type=Path, help="where their virtual environments lie")
    parser.add_argument("--system", nargs="+", choices=[OURS, *PEERS], default=[OURS])
    parser.add_argument("--resume", action="store_true", help="keep the starts of the result there")
    options = parser.parse_args()
    if options.peers is None and set(options.system) != {OURS}:
        parser.error("--peers is needed for other systems than ours")
    return options


def _plain(starts: Sequence[Start]) -> list[dict[str, object]]:
    return [asdict(start) for start in starts]


def _summary(starts: Sequence[Start]) -> dict[str, dict[str, float]]:
    """Medians by system."""
    rows = {}
    for system in dict.fromkeys(start.system for start in starts):
        own = [start for start in starts if start.system == system]
        rows[system] = {
            "rounds": len(own),
            "first_token_s": statistics.median(start.first_token_s for start in own),
            "last_answer_s": statistics.median(start.last_answer_s for start in own),
        }
    return rows


if __name__ == "__main__":
    main()
