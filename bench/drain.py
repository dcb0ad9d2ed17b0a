"""Claim: SIGTERM under full load to exit takes less than 5 s, and what ran goes on elsewhere.

The real command with SmolLM2 on the CPU and a real server: each worker runs all the sequences that
it may while others wait, and is told to stop; the next one takes over, until the last may finish.

    python bench/drain.py [--drains 3] [--sequences 32] [--requests 64] [--tokens 48]
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

from queue_servers import Server, running
from workloads import write_result

from tokenmill.engine.sources import pull
from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys

KEYS = Keys()
#: Longest that anything here may take, in seconds.
PATIENCE_S = 120.0
#: What was promised.
MOST_S = 5.0


class Drained:
    """The run, and what was seen in it."""

    def __init__(self, server: Server, sequences: int, log: IO[bytes]) -> None:
        self._server, self._sequences, self._log = server, sequences, log
        self.rounds: list[dict[str, Any]] = []

    def start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "tokenmill.producer.cli", "worker", "--model", "smollm2"]
        command += ["--redis", self._server.url, "--max-num-seqs", str(self._sequences)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(command, env=environment, stderr=self._log)

    def records(self, ids: list[str]) -> list[dict[str, str]]:
        names = ("state", "attempts", "offset", "epoch")
        with self._server.client.pipeline(transaction=False) as pipeline:
            for request_id in ids:
                pipeline.hmget(KEYS.record(request_id), names)
            rows: list[Any] = pipeline.execute()
        return [
            {name: value.decode() for name, value in zip(names, row, strict=True)} for row in rows
        ]

    def drain(self, process: "subprocess.Popen[bytes]", ids: list[str]) -> None:
        """Stop it once it is full and has written of each, and note how that went."""
        before = self._until_full(ids)
        process.send_signal(signal.SIGTERM)
        told_at = time.monotonic()
        status = process.wait(PATIENCE_S)
        took_s = time.monotonic() - told_at
        after = self.records(ids)
        parked = [row for row in after if row["state"] == "park"]
        self.rounds.append(
            {
                "exit_s": round(took_s, 3),
                "status": status,
                "running": sum(row["state"] == "run" for row in before),
                "waiting": sum(row["state"] == "wait" for row in before),
                "released_with_tokens": sum(int(row["offset"]) > 0 for row in parked),
                "left_running": sum(row["state"] == "run" for row in after),
                "attempts_counted": sum(int(row["attempts"]) for row in parked),
                "leases_left": int(self._server.client.zcard(KEYS.workers)),
            }
        )

    def _until_full(self, ids: list[str]) -> list[dict[str, str]]:
        ends_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends_at:
            rows = self.records(ids)
            busy = [row for row in rows if row["state"] == "run" and int(row["offset"]) > 0]
            if len(busy) >= self._sequences and any(row["state"] != "run" for row in rows):
                return rows
            time.sleep(0.02)
        raise SystemExit("the worker was not full in time: more --requests or --tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drains", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--server", choices=["valkey", "redis"], default="valkey")
    options = parser.parse_args()
    pull("smollm2")
    with tempfile.TemporaryDirectory() as directory, running(options.server) as server:
        log = Path(directory) / "log"
        with Client(server.url) as client, log.open("wb") as file:
            ids = client.submit_many(
                client.new_request(f"Write line {n}.", max_tokens=options.tokens, ignore_eos=True)
                for n in range(options.requests)
            )
            run = Drained(server, options.sequences, file)
            for _ in range(options.drains):
                run.drain(run.start(), ids)
            last = run.start()
            results = [client.result(request_id, timeout_s=PATIENCE_S) for request_id in ids]
            last.send_signal(signal.SIGTERM)
            last.wait(PATIENCE_S)
            attempts = Counter(row["attempts"] for row in run.records(ids))
            resumed = sum(len(_epochs(server, request_id)) > 1 for request_id in ids)
    is_whole = all(len(result.token_ids) == options.tokens for result in results)
    is_right = is_whole and set(attempts) == {"1"} and all(map(_is_right, run.rounds))
    figures = {
        "server": server.name,
        "options": vars(options),
        "drains": run.rounds,
        "slowest_exit_s": max(row["exit_s"] for row in run.rounds),
        "requests_answered_by_several_workers": resumed,
        "attempts_in_the_end": dict(attempts),
        "is_right": is_right,
    }
    print(write_result("drain", None, figures).read_text())
    return 0 if is_right else 1


def _is_right(row: dict[str, Any]) -> bool:
    clean = row["status"] == row["left_running"] == row["attempts_counted"] == row["leases_left"]
    return bool(clean and not row["status"] and row["exit_s"] < MOST_S)


def _epochs(server: Server, request_id: str) -> set[bytes]:
    entries: Any = server.client.xrange(KEYS.output(request_id))
    return {fields[b"e"] for _, fields in entries}


if __name__ == "__main__":
    sys.exit(main())
