"""`Stage`: a queue of its own with workers of its own, for one directed schedule."""

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from audit import audit
from checker import Report, check
from mix import Job, job, letters, token
from roles import submit
from server import ChaosServer
from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.params import derived_seed
from tokenmill.producer.wire import Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish, Queue, Verdict
from zygote import Child, Zygote

LEASE_MS = 300
#: Longest that anything here takes.
PATIENCE_S = 15.0


@dataclass
class Stage:
    """Close it in the end. `mutant` is what its workers run with."""

    zygote: Zygote
    server: ChaosServer
    mutant: str = ""
    home: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="tm-stage-")))
    report: Report = field(default_factory=Report)
    workers: list[Child] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = self.home.name
        self.keys = Keys(self.queue)
        self.direct = self.server.connect()

    def submit(self, some: int, *, may_expire: bool = False) -> None:
        """Long jobs that nobody cancels; `may_expire`: with a deadline."""
        numbers = (n for n in count() if _fits(job(self.queue, n), may_expire=may_expire))
        self.jobs = [job(self.queue, next(numbers)) for _ in range(some)]
        with Client(self.server.url, queue=self.queue) as client:
            submit(client, self.jobs)
        lines = [json.dumps({"sent": item.number}) for item in self.jobs]
        (self.home / "producer-0").write_text("\n".join(lines) + "\n")

    def start_worker(self, url: str = "", **options: Any) -> Child:
        settings = {"lease_ms": LEASE_MS, "step_ms": 5, "mutant": self.mutant, **options}
        log = self.home / f"worker-{len(self.workers)}"
        address = {"url": url or self.server.url, "queue": self.queue}
        self.workers.append(self.zygote.fork("roles.worker", log, **address, **settings))
        return self.workers[-1]

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it; False, and noted, if it takes too long."""
        ends_at = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > ends_at:
                self.report.note("lost", f"nothing moves: {self.records()}")
                return False
            self.audit()
            time.sleep(0.005)
        return True

    def audit(self) -> None:
        for text in audit(self.direct, self.keys.tag):
            self.report.note("contradictions", text)

    def until_run_by(self, child: Child, *, offset: int = 0) -> None:
        """Until a worker runs all jobs and each has at least `offset` tokens."""
        self.until(
            lambda: all(
                r["state"] == "run"
                and f"-{child.pid}-" in r["worker"]
                and int(r["offset"]) >= offset
                for r in self.records()
            )
        )

    def records(self) -> list[dict[str, str]]:
        names = ("state", "epoch", "offset", "worker", "attempts")
        rows: list[Any] = [
            self.direct.hmget(self.keys.record(item.request_id), *names) for item in self.jobs
        ]
        return [
            {name: (value or b"").decode() for name, value in zip(names, row, strict=True)}
            for row in rows
        ]

    def has_ended_or_refused(self) -> bool:
        """Whether all has ended, or a worker was refused what it wanted to write."""
        if all(r["state"] == "end" for r in self.records()):
            return True
        return any(b"request_refused" in log.read_bytes() for log in self.home.glob("worker-*"))

    def end(self) -> Report:
        """Let the workers bring everything to its end, stop them, and check."""
        is_right = self.report.is_right
        if is_right and self.until(self.has_ended_or_refused):
            alive = [child for child in self.workers if child.poll() is None]
            self.until(lambda: self.direct.zcard(self.keys.workers) <= len(alive))
        for child in self.workers:
            child.send(signal.SIGTERM)
        for child in self.workers:
            if child.poll(PATIENCE_S) not in (0, -signal.SIGKILL):
                self.report.note("crashed", f"a worker ended with {child.poll()}")
        return check(self.report, {0: self.direct}, self.queue, self.queue, self.home)

    def close(self) -> None:
        for child in self.workers:
            child.send(signal.SIGKILL)
            child.poll(PATIENCE_S)
        self.direct.close()
        shutil.rmtree(self.home)


class Puppet:
    """A worker that takes its steps by hand; it writes the log that a worker would write."""

    def __init__(self, stage: Stage, *, lease_ms: int) -> None:
        self._server = stage.server.connect()
        self._log = stage.home / "worker-puppet"
        self._jobs = {item.request_id: item for item in stage.jobs}
        self._queue = Queue(self._server, stage.keys, "host-0-puppet", lease_ms=lease_ms)
        self.claims: list[Claim] = []
        self.tokens: dict[str, list[int]] = {}

    def claim(self) -> None:
        self.claims = self._queue.claim(sequences=64, tokens=10_000, kv_tokens=1_000_000)
        for claim in self.claims:
            self.tokens[claim.request_id] = list(claim.token_ids)
            self._note("request_claimed", claim, committed=len(claim.token_ids))

    def generate(self, claim: Claim, some: int) -> tuple[int, ...]:
        item, tokens = self._jobs[claim.request_id], self.tokens[claim.request_id]
        seed = derived_seed(item.request_id) if item.seed is None else item.seed
        start = len(tokens)
        for _ in range(some):
            tokens.append(token(item.prompt.encode(), seed, tokens, claim.epoch))
        return tuple(tokens[start:])

    def append(self, claim: Claim, some: int) -> Verdict:
        """Generate so many tokens and write them."""
        given = self.generate(claim, some)
        return self.write(claim, given)

    def write(self, claim: Claim, given: tuple[int, ...]) -> Verdict:
        """Write the last tokens generated, now or again."""
        tokens = self.tokens[claim.request_id]
        piece = Append(
            request_id=claim.request_id,
            epoch=claim.epoch,
            start=len(tokens) - len(given),
            token_ids=given,
            text=letters(given),
            digest=chain_digest("", tokens),
        )
        return self._queue.append([piece])[0]

    def finish(self, claim: Claim) -> Verdict:
        """Generate the rest and end it."""
        total = self._jobs[claim.request_id].max_tokens
        given = self.generate(claim, total - len(self.tokens[claim.request_id]))
        end = Finish(
            request_id=claim.request_id,
            epoch=claim.epoch,
            start=total - len(given),
            token_ids=given,
            text=letters(given),
            digest=chain_digest("", self.tokens[claim.request_id]),
            finish_reason="length",
            usage=Usage(prompt_tokens=1, completion_tokens=total),
        )
        verdict = self._queue.finish([end])[0]
        if verdict is Verdict.OK:
            self._note("request_finished", claim, finish_reason="length")
        return verdict

    def release(self, claim: Claim) -> Verdict:
        return self._queue.release(claim.request_id, claim.epoch, undo=True)

    def reap(self) -> int:
        return self._queue.reap()

    def retire(self) -> None:
        self._queue.retire()

    def close(self) -> None:
        self._server.close()

    def _note(self, event: str, claim: Claim, **fields: Any) -> None:
        line = {"event": event, "request_id": claim.request_id, "epoch": claim.epoch, **fields}
        with self._log.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _fits(item: Job, *, may_expire: bool) -> bool:
    is_long = item.max_tokens >= 60 and (item.deadline_s > 3 or not may_expire)
    is_usual = not item.is_plain and not item.reply_to and item.cancel_after_s is None
    is_here = item.request_id.startswith("0.")  # a stage has one shard
    return is_long and is_usual and is_here and item.may_expire == may_expire
