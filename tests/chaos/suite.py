"""The chaos suite: `python tests/chaos/suite.py --seconds 60 --seed 7 [--output FILE]`.

Producers submit, workers generate, readers follow, all through a proxy to one server; meanwhile
all of them are killed, stopped, cut off and restarted, as a seed says. Then the faults stop, all
comes to rest, and `checker` reads everything. The exit status is 0 if nothing was wrong.
"""

import argparse
import json
import platform
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from audit import audit
from checker import Report, check
from faults import Faults
from mix import SHARDS
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator
from zygote import Child, Zygote

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "rig"))

from places import Alone, Group, Place  # noqa: E402 - it needs the path, also as a script

QUEUE = "chaos"
LEASE_MS, STEP_MS = 1000, 15
#: Share of the engine's steps that fail.
FAILING = 0.001
WORKERS, PRODUCERS, READERS = 3, 2, 2
#: Requests that are live at once.
WINDOW = 120
#: Longest from the last fault to the end of the last request.
REST_S = 180.0
AUDIT_S = 0.5
MOST_TIMES = 4
#: Tenants differ in weight, and one meets its quota.
SETTINGS: dict[Any, Any] = {"weight:t1": 3, "weight:t2": 0.5, "quota:t3": 20}


class Run:
    """One run, from the first process to the report."""

    def __init__(
        self,
        *,
        seed: str,
        seconds: float,
        kind: str = "valkey",
        count: int = 10**9,
        intensity: float = 1.0,
        is_lossy: bool = False,
        servers: str = "",
        least: Mapping[str, int] | None = None,
    ) -> None:
        """`is_lossy`: restarts lose what was written in the last moments, as failovers may.

        `servers`: sentinel, cluster, or "" for one.

        `least`: of requests and faults; the run goes on for them, up to `MOST_TIMES` as long."""
        self.seed = seed
        self.seconds = seconds
        self.count = count
        self.intensity = intensity
        self.is_lossy = is_lossy or bool(servers)
        self._least = least or {}
        self.report = Report()
        self.home = Path(tempfile.mkdtemp(prefix="tm-chaos-"))
        self.workers: list[Child] = []
        self.producers: dict[int, Child] = {}
        self.readers: dict[int, Child] = {}
        self.collectors: dict[int, Child] = {}
        self._born = 0
        self._shards = [Keys(QUEUE, shard) for shard in range(SHARDS)]
        tags = [keys.tag for keys in self._shards]
        self.place: Place = Group(kind, servers, tags) if servers else Alone(kind)
        self._audit_at = 0.0
        self._is_resting = False

    def execute(self) -> dict[str, Any]:
        """Everything; returns the report with the counts of faults."""
        began = time.monotonic()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.home)
            stack.enter_context(self.place)
            self._zygote = stack.enter_context(Zygote())
            self._direct = {keys.shard: self.place.connect(keys) for keys in self._shards}
            for server in self._direct.values():
                stack.callback(server.close)
            self.version = self._direct[0].info("server")
            self._direct[0].set(self._shards[0].shards, SHARDS)
            for keys in self._shards:
                self._direct[keys.shard].hset(keys.settings, mapping=SETTINGS)
            faults = Faults(self, random.Random(self.seed))
            self._suffer(faults)
            self._rest(faults)
            check(self.report, self._direct, QUEUE, self.seed, self.home, is_lossy=self.is_lossy)
        return {
            "seed": self.seed,
            "seconds": round(time.monotonic() - began, 1),
            **self.report.as_dict(),
            **faults.counts,
            "slowest_drain_s": round(faults.slowest_drain_s, 2),
        }

    def holders(self) -> dict[int, str]:
        """Worker id by process id, of workers that hold something."""
        try:
            return {
                int(name.split("-")[-2]): name
                for keys in self._shards
                for name in self._leases(keys)
                if self._direct[keys.shard].exists(keys.own(name))
            }
        except RedisError:
            return {}

    def has_lease(self, worker_id: str) -> bool:
        """Whether a shard has not declared the worker dead."""
        try:
            return any(worker_id in self._leases(keys) for keys in self._shards)
        except RedisError:
            return True

    def set_pause(self, *, is_on: bool) -> bool:
        """Pause the queue, or let it go on; False: the server is down."""
        try:
            for keys in self._shards:
                operator = Operator(self._direct[keys.shard], keys)
                (operator.pause if is_on else operator.resume)()
        except RedisError:
            return False
        return True

    def _suffer(self, faults: Faults) -> None:
        began = time.monotonic()
        while not self._is_enough(faults, time.monotonic() - began):
            self._staff()
            faults.turn()
            self._audit()
            time.sleep(0.02)
        faults.end()
        while not self.place.settle():
            time.sleep(0.1)

    def _is_enough(self, faults: Faults, seconds: float) -> bool:
        if self._is_done() or seconds >= MOST_TIMES * self.seconds:
            return True
        return seconds >= self.seconds and all(
            faults.counts.get(name, self._sent()) >= least for name, least in self._least.items()
        )

    def _sent(self) -> int:
        return sum(path.read_bytes().count(b'"sent"') for path in self.home.glob("producer-?"))

    def _is_done(self) -> bool:
        return bool(self.producers) and all(c.poll() == 0 for c in self.producers.values())

    def _rest(self, faults: Faults) -> None:
        """Without faults all comes to an end; a last worker tidies up after the dead."""
        while not self.set_pause(is_on=False):  # the server may have lost that it goes on
            time.sleep(0.1)
        (self.home / "stop").touch()
        ends_at = time.monotonic() + REST_S
        while time.monotonic() < ends_at:
            self._staff()
            self._audit()
            if self._is_done():
                (self.home / "producers-done").touch()
            ending = [*self.readers.values(), *self.collectors.values()]
            if all(child.poll() == 0 for child in ending) and not self._has_live():
                break
            time.sleep(0.02)
        else:
            self.report.note("lost", f"not at rest {REST_S:g} s after the last fault")
        while time.monotonic() < ends_at and self._has_dead():
            time.sleep(0.05)
        self._is_resting = True
        for child in self.workers:
            child.send(signal.SIGTERM)
        for child in self.workers:
            if child.poll(20.0) != 0:
                self.report.note("crashed", f"a worker at rest ended with {child.poll()}")

    def _has_live(self) -> bool:
        """Whether a request has still to end: after its reader left, it may run again."""
        try:
            return any(self._direct[keys.shard].zcard(keys.live) for keys in self._shards)
        except RedisError:
            return True

    def _has_dead(self) -> bool:
        """Whether somebody who died has still to be buried."""
        return any(len(self._leases(keys)) > WORKERS for keys in self._shards)

    def _leases(self, keys: Keys) -> list[str]:
        found: Any = self._direct[keys.shard].zrange(keys.workers, 0, -1)
        return [name.decode() for name in found]

    def _staff(self) -> None:
        """Replace who has died; who died by itself is noted."""
        for child in self.workers:
            if child.poll() not in (None, 0, -signal.SIGKILL):
                self.report.note("crashed", f"a worker ended with {child.poll()}")
        self.workers = [child for child in self.workers if child.poll() is None]
        while len(self.workers) < WORKERS:
            self._born += 1
            self.workers.append(
                self._zygote.fork(
                    "roles.worker",
                    self.home / f"worker-{self._born}",
                    url=self.place.url,
                    queue=QUEUE,
                    lease_ms=LEASE_MS,
                    step_ms=STEP_MS,
                    failing=FAILING,
                )
            )
        for role, children, of in (
            ("producer", self.producers, PRODUCERS),
            ("reader", self.readers, READERS),
            ("collector", self.collectors, 1),
        ):
            for index in range(of):
                self._staff_one(role, children, index, of)

    def _staff_one(self, role: str, children: dict[int, Child], index: int, of: int) -> None:
        status = children[index].poll() if index in children else -signal.SIGKILL
        if status in (None, 0):
            return
        if status != -signal.SIGKILL:
            self.report.note("crashed", f"{role} {index} ended with {status}")
        more = {"window": WINDOW, "count": self.count} if role == "producer" else {}
        children[index] = self._zygote.fork(
            f"roles.{role}",
            self.home / f"log-{role}-{index}",
            url=self.place.url,
            queue=QUEUE,
            seed=self.seed,
            directory=str(self.home),
            index=index,
            of=of,
            is_lossy=self.is_lossy,
            **more,
        )

    def _audit(self) -> None:
        if time.monotonic() < self._audit_at:
            return
        self._audit_at = time.monotonic() + AUDIT_S
        for keys in self._shards:
            for text in audit(self._direct[keys.shard], keys.tag):
                self.report.note("contradictions", text)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of faults")
    parser.add_argument("--seed", default="", help="of requests and faults; random if not given")
    parser.add_argument("--requests", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--server", choices=["valkey", "redis"], default="valkey")
    parser.add_argument("--servers", choices=["sentinel", "cluster"], default="", help="not one")
    parser.add_argument("--intensity", type=float, default=1.0, help="factor on the fault rates")
    parser.add_argument(
        "--least", default="", help="go on for so many, as `requests=5000,kills=300,restarts=20`"
    )
    parser.add_argument(
        "--lossy", action="store_true", help="restarts lose the last moments, as after a host crash"
    )
    parser.add_argument("--output", type=Path, help="write the report there, as JSON")
    given = parser.parse_args(arguments)
    seed = given.seed or secrets.token_hex(4)
    print(f"seed {seed}", flush=True)
    run = Run(
        seed=seed,
        seconds=given.seconds,
        kind=given.server,
        count=given.requests,
        intensity=given.intensity,
        is_lossy=given.lossy,
        servers=given.servers,
        least={name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", given.least)},
    )
    report = run.execute()
    report = {**report, **_versions(run.version)}
    if given.servers:
        report["server"] = f"{report['server'].partition(',')[0]}, {given.servers}"
    elif given.lossy:
        report["server"] += ", its last moments lost at restarts"
    text = json.dumps(report, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
    return 0 if run.report.is_right else 1


def _versions(server: Any) -> dict[str, str]:
    name = server.get("server_name", "redis")
    number = server.get(f"{name}_version", server["redis_version"])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    return {
        "server": f"{name} {number}, appendfsync always",
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
