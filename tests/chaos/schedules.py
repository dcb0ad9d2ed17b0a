"""Directed schedules: each brings about, every time, the moment that a guard is there for.

The suite meets these moments by chance; here a planted fault has nowhere to hide.
"""

import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing

from mutants import planted
from proxy import Proxy
from stage import LEASE_MS, Puppet, Stage
from tokenmill.worker.queue import Verdict

SLOW_MS = 700


def zombie_writes(stage: Stage) -> None:
    """A worker sleeps past its lease and wakes after another has claimed, and not yet written."""
    stage.submit(6)
    sleeper = stage.start_worker()
    stage.until_run_by(sleeper, offset=3)
    sleeper.send(signal.SIGSTOP)
    other = stage.start_worker(first_step_ms=SLOW_MS)
    stage.until_run_by(other)
    sleeper.send(signal.SIGCONT)


def zombie_ends(stage: Stage) -> None:
    """A worker that was declared dead ends a request that another has claimed meanwhile."""
    stage.submit(1)
    with planted(stage.mutant), closing(Puppet(stage, lease_ms=50)) as puppet:
        puppet.claim()
        [claim] = puppet.claims
        puppet.append(claim, 5)
        stage.until_run_by(stage.start_worker(first_step_ms=SLOW_MS))
        puppet.finish(claim)


def answers_lost(stage: Stage) -> None:
    """What was written is written again, since nobody heard that it was."""
    stage.submit(6)
    rng = random.Random(1)
    with Proxy(stage.server.socket) as proxy:
        worker = stage.start_worker(proxy.url, lease_ms=5000)
        stage.until_run_by(worker, offset=1)
        for _ in range(12):
            proxy.hurt(rng, "lose_answer")
            time.sleep(0.02)
        stage.until(stage.has_ended_or_refused)
        worker.send(signal.SIGTERM)
        worker.poll(5.0)


def rolled_back(stage: Stage) -> None:
    """The server loses what it had acknowledged; the worker goes on from where it was."""
    stage.submit(1)
    _roll_back(stage, is_ending=False)
    stage.start_worker()


def rolled_back_at_its_end(stage: Stage) -> None:
    """As `rolled_back`, and what the worker writes next is the end."""
    stage.submit(1)
    _roll_back(stage, is_ending=True)
    stage.start_worker()


def orphans(stage: Stage) -> None:
    """A worker is killed in the middle; what it ran is parked, and another takes over."""
    stage.submit(6)
    victim = stage.start_worker()
    stage.until_run_by(victim, offset=3)
    victim.send(signal.SIGKILL)
    victim.poll(5.0)
    with planted(stage.mutant), closing(Puppet(stage, lease_ms=1)) as puppet:
        stage.until(lambda: puppet.reap() > 0 or not stage.direct.exists(stage.keys.workers))
        stage.audit()
    stage.start_worker()


def calm(stage: Stage) -> None:
    """Nobody dies, for several leases: nothing may change its owner."""
    stage.submit(6)
    stage.start_worker(step_ms=3 * LEASE_MS / 60)
    stage.start_worker()
    stage.until(lambda: all(r["state"] == "end" for r in stage.records()))
    if any(r["epoch"] != "1" for r in stage.records()):
        stage.report.note("contradictions", "taken from a worker that was alive")


def overdue(stage: Stage) -> None:
    """A request expires while a worker runs it, and the worker ends it too late."""
    stage.submit(1, may_expire=True)
    with planted(stage.mutant), closing(Puppet(stage, lease_ms=60_000)) as puppet:
        puppet.claim()
        [claim] = puppet.claims
        puppet.append(claim, 5)
        stage.direct.zadd(stage.keys.live, {claim.request_id: 1})
        puppet.reap()
        puppet.finish(claim)
        puppet.retire()


SCHEDULES: dict[str, Callable[[Stage], None]] = {
    call.__name__: call
    for call in (
        zombie_writes,
        zombie_ends,
        answers_lost,
        rolled_back,
        rolled_back_at_its_end,
        orphans,
        calm,
        overdue,
    )
}


def _roll_back(stage: Stage, *, is_ending: bool) -> None:
    files, copy = stage.server.directory / "appendonlydir", stage.home / "appendonlydir"
    with planted(stage.mutant), closing(Puppet(stage, lease_ms=60_000)) as puppet:
        puppet.claim()
        [claim] = puppet.claims
        puppet.append(claim, 5)
        shutil.copytree(files, copy)
        puppet.append(claim, 5)
        stage.server.kill()
        shutil.rmtree(files)
        shutil.copytree(copy, files)
        stage.server.start()
        verdict = puppet.finish(claim) if is_ending else puppet.append(claim, 5)
        if verdict is Verdict.GAP:
            puppet.release(claim)
        elif not is_ending:
            puppet.finish(claim)
        puppet.retire()
