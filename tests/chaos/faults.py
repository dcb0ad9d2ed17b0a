"""`Faults`: what is done to processes, connections and the server, drawn from a seed.

Each kind comes at its own rate, at random times. A fault that finds no victim (no worker holds
anything, no connection is open) waits for one.
"""

import math
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from proxy import CUTS
from zygote import Child

if TYPE_CHECKING:
    from suite import Run

#: Faults a second.
RATES = {
    "kills": 0.62,
    "zombies": 0.085,
    "restarts": 0.04,
    "cuts": 0.15,
    "delays": 0.1,
    "drains": 0.05,
    "pauses": 0.03,
    "producer_kills": 0.05,
    "reader_kills": 0.05,
}
#: A zombie that was not declared dead after so long is woken anyway, and not counted.
PATIENCE_S = 6.0


class Faults:
    """`turn` does what is due."""

    def __init__(self, run: "Run", rng: random.Random) -> None:
        self._run = run
        self._rng = rng
        self.counts: Counter[str] = Counter(dict.fromkeys(RATES, 0))
        #: Longest time from SIGTERM to the exit, in seconds, of drains without a server restart.
        self.slowest_drain_s = 0.0
        now = time.monotonic()
        self._due = {kind: now + self._gap(kind) for kind in RATES}
        #: Stopped workers: when, what each held, and when it may wake.
        self._stopped: dict[Child, tuple[float, str, float]] = {}
        self._draining: dict[Child, float] = {}
        #: When the queue goes on.
        self._resume_at = math.inf

    def turn(self) -> None:
        now = time.monotonic()
        for kind, at in self._due.items():
            if at <= now and getattr(self, f"_do_{kind}")():
                self._due[kind] = now + self._gap(kind)
                self.counts[kind] += kind != "zombies"  # counted when it wakes as one
        self.settle()

    def settle(self) -> None:
        """Wake who slept long enough, see who has drained, and bring back servers."""
        self._run.place.settle()
        for child, (since, worker_id, not_before) in list(self._stopped.items()):
            is_dead = time.monotonic() >= not_before and not self._run.has_lease(worker_id)
            if is_dead or time.monotonic() - since > PATIENCE_S:
                del self._stopped[child]
                child.send(signal.SIGCONT)
                self.counts["zombies"] += is_dead
        if time.monotonic() >= self._resume_at and self._run.set_pause(is_on=False):
            self._resume_at = math.inf
        for child, since in list(self._draining.items()):
            status = child.poll()
            if status is not None:
                del self._draining[child]
                self.slowest_drain_s = max(self.slowest_drain_s, time.monotonic() - since)
                if status != 0:
                    self._run.report.note("crashed", f"a drained worker ended with {status}")

    def end(self) -> None:
        """No more faults: wake whoever sleeps."""
        self._resume_at = min(self._resume_at, time.monotonic())
        while self._stopped or self._draining or self._resume_at < math.inf:
            self.settle()
            time.sleep(0.02)

    def _gap(self, kind: str) -> float:
        return self._rng.expovariate(RATES[kind] * self._run.intensity)

    def _victim(self) -> Child | None:
        """A worker that holds something."""
        held = self._run.holders()
        busy = [c for c in self._run.workers if c.pid in held and c.poll() is None]
        able = [c for c in busy if c not in self._stopped and c not in self._draining]
        return self._rng.choice(able) if able else None

    def _do_kills(self) -> bool:
        child = self._victim()
        if child is None:
            return False
        child.send(signal.SIGKILL)
        child.poll(10.0)
        return True

    def _do_zombies(self) -> bool:
        child = self._victim()
        worker_id = self._run.holders().get(child.pid) if child else None
        if child is None or worker_id is None or self._stopped:
            return False
        child.send(signal.SIGSTOP)
        now = time.monotonic()
        self._stopped[child] = (now, worker_id, now + self._rng.uniform(0.0, 3.0))
        return True

    def _do_drains(self) -> bool:
        child = self._victim()
        if child is None:
            return False
        child.send(signal.SIGTERM)
        self._draining[child] = time.monotonic()
        return True

    def _do_pauses(self) -> bool:
        self._resume_at = time.monotonic() + self._rng.uniform(0.2, 1.5)
        return self._run.set_pause(is_on=True)

    def _do_restarts(self) -> bool:
        if not self._run.place.restart(self._rng, is_lossy=self._run.is_lossy):
            return False
        # What drains meanwhile waits for the server: it says nothing about drains.
        self._draining = dict.fromkeys(self._draining, math.inf)
        return True

    def _do_cuts(self) -> bool:
        return self._run.place.hurt(self._rng, self._rng.choice(CUTS))

    def _do_delays(self) -> bool:
        return self._run.place.hurt(self._rng, "delay", self._rng.uniform(0.05, 2.0))

    def _do_producer_kills(self) -> bool:
        return self._kill_one(self._run.producers)

    def _do_reader_kills(self) -> bool:
        return self._kill_one({**self._run.readers, -1: self._run.collectors[0]})

    def _kill_one(self, children: dict[int, Child]) -> bool:
        child: Any = self._rng.choice(list(children.values()))
        if child.poll() is not None:
            return False
        child.send(signal.SIGKILL)
        child.poll(10.0)
        return True
