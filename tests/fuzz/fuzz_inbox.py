"""Malformed requests against a real worker: `python tests/fuzz/fuzz_inbox.py --count 100000`.

A worker process with a scripted engine serves the queue. Entries of `NearMisses` go into its inbox;
the same payloads are planted in records, as a hostile producer with the rights to write them could;
at last keys that a worker reads are replaced by keys of other types, and repaired. It must be the
same process all the time, every request must end, what is bad with an error that names the field,
what is sound without, and nothing may be left in an index. The exit status is 0 if so.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import redis

from near_misses import Entry, NearMisses
from tokenmill.producer.client import Client
from tokenmill.producer.keys import GROUP, Keys
from tokenmill.producer.request_id import request_id_for

HERE = Path(__file__).parent
KEYS = Keys()
BATCH = 500
#: Longest to wait for a batch to end.
PATIENCE_S = 60.0
NAMES_A_FIELD = re.compile(r".+ must be .*, got ", re.DOTALL)


class Failed(Exception):
    """Something was not as it must be."""


class Run:
    """One run against one server; `report` is what came of it."""

    def __init__(self, url: str, seed: str) -> None:
        self.report: dict[str, Any] = {"seed": seed, "entries": Counter(), "ended": Counter()}
        self._url = url
        self._server: redis.Redis = redis.Redis.from_url(url, protocol=2)
        self._source = NearMisses(seed)

    def inbox(self, count: int) -> None:
        """Send entries to the inbox, batch by batch, and look at the end of each."""
        for first in range(0, count, BATCH):
            entries = [next(self._source) for _ in range(min(BATCH, count - first))]
            with self._server.pipeline(transaction=False) as pipeline:
                for entry in entries:
                    pipeline.xadd(KEYS.inbox, entry.fields)  # type: ignore[arg-type]
                ids = [_made(entry_id.decode()) for entry_id in pipeline.execute()]
            self._await_rest()
            for entry, made in zip(entries, ids, strict=True):
                self._check(entry, made)
            self._server.flushall()

    def records(self, count: int) -> None:
        """Plant payloads in records, as if `enqueue` had written them."""
        for first in range(0, count, BATCH):
            entries = [next(self._source) for _ in range(min(BATCH, count - first))]
            ids = [request_id_for(f"planted {first + n}") for n in range(len(entries))]
            with self._server.pipeline() as pipeline:
                for entry, request_id in zip(entries, ids, strict=True):
                    self._plant(pipeline, request_id, next(iter(entry.fields.values())))
                pipeline.xadd(KEYS.control, {"t": "wake"})
                pipeline.execute()
            self._await_rest()
            for request_id in ids:
                reason = self._ended(request_id)
                if reason is None or not NAMES_A_FIELD.match(reason):
                    raise Failed(f"planted payload: {request_id} ended with {reason!r}")
            self.report["entries"]["planted payload"] += len(entries)
            self._server.flushall()

    def _plant(self, pipeline: Any, request_id: str, payload: bytes) -> None:
        lane, deadline = KEYS.lane(1, "default"), int(time.time() * 1000) + 3_600_000
        reference = {"id": request_id, "cost": 1, "most": 1}
        entry_id = f"{int(time.time() * 1000)}-{self.report['entries'].total() + len(pipeline)}"
        pipeline.xadd(lane, reference, id=entry_id)
        record = {
            "state": "wait",
            "epoch": 0,
            "offset": 0,
            "attempts": 0,
            "worker": "",
            "cost": 1,
            "tenant": "default",
            "priority": 1,
            "entry": entry_id,
            "deadline": deadline,
            "most": 1,
            "print": "",
            "payload": payload,
            "created": 1,
            "reply": "",
        }
        pipeline.hset(KEYS.record(request_id), mapping=record)
        pipeline.zadd(KEYS.live, {request_id: deadline})
        pipeline.zadd(KEYS.lanes(1), {"default": 0})
        pipeline.hincrby(KEYS.tenants, "default", 1)

    def types(self, worker_id: str, *, is_thorough: bool) -> None:
        """Put keys of other types where a worker reads, and repair them: it must serve again."""
        keys = [
            *(
                KEYS.inbox,
                KEYS.live,
                KEYS.park,
                KEYS.workers,
                KEYS.control,
                KEYS.tenants,
                KEYS.dead,
            ),
            *(KEYS.aged, KEYS.lanes(1), KEYS.settings, KEYS.lane(1, "default")),
            *(KEYS.own(worker_id), KEYS.worker(worker_id)),
        ]
        forms = (_as_string, _as_list, _as_hash, _as_stream)
        for number, key in enumerate(keys):
            for form in forms if is_thorough else forms[number % 4 :][:1]:
                self._replace(key, form)
                self.report["entries"]["keys of another type"] += 1

    def _replace(self, key: str, form: Callable[[redis.Redis, str], None]) -> None:
        form(self._server, key)
        with Client(self._url) as client, suppress(redis.ResponseError):
            client.submit("while it is broken")  # where that is possible at all
        self._server.flushall()
        with Client(self._url) as client:
            result = client.result(client.submit("after it was repaired"), timeout_s=30)
        if not result.ok:
            raise Failed(f"{key} was repaired, and a request ended as {result}")
        self._await_rest()

    def _await_rest(self) -> None:
        ends_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends_at:
            left = [
                self._server.xlen(KEYS.inbox),
                self._server.zcard(KEYS.live),
                self._server.zcard(KEYS.park),
                self._server.hlen(KEYS.tenants),
            ]
            if not any(left):
                return
            time.sleep(0.01)
        raise Failed(f"not at rest: inbox, live, park, tenants = {left}")

    def _check(self, entry: Entry, made: str) -> None:
        reason = self._ended(made)
        if reason is None:
            reason = self._ended(_given_id(entry.fields))
        self.report["entries"][entry.kind] += 1
        shown = f"{entry.kind}, {str(entry.fields)[:500]}: {reason!r}"
        if reason is None:
            raise Failed(f"it has not ended: {shown}")
        self.report["ended"]["as a request" if reason == "" else "as an error"] += 1
        if reason and not NAMES_A_FIELD.match(reason):
            raise Failed(f"its error names no field: {shown}")
        if entry.is_sound is not None and entry.is_sound != (reason == ""):
            raise Failed(f"it should {'not ' if entry.is_sound else ''}have been refused: {shown}")
        if entry.named and entry.named not in reason.split(" must be ")[0]:
            raise Failed(f"its error must name {entry.named}: {shown}")

    def _ended(self, request_id: str) -> str | None:
        """The reason of an error, "" without one; None if it is unknown or has not ended."""
        row: Any = self._server.hmget(KEYS.record(request_id), "state", "finish", "reason")
        state, finish, reason = (item.decode() if item else "" for item in row)
        if state != "end":
            return None
        return reason if finish == "error" else ""


def _made(entry_id: str) -> str:
    ms, _, seq = entry_id.partition("-")
    return f"0.{int(ms):020d}-{int(seq):05d}"


def _given_id(fields: Mapping[bytes, bytes]) -> str:
    """The id that an entry names, if it can be read."""
    ((name, data),) = fields.items()
    parse: Callable[[bytes], Any] = json.loads if name == b"json" else msgpack.unpackb
    with suppress(ValueError):
        return str(parse(data).get("request_id"))
    return ""


def _as_string(server: redis.Redis, key: str) -> None:
    server.set(key, "x")


def _as_list(server: redis.Redis, key: str) -> None:
    server.delete(key)
    server.rpush(key, "x")


def _as_hash(server: redis.Redis, key: str) -> None:
    server.delete(key)
    server.hset(key, "id", "x")


def _as_stream(server: redis.Redis, key: str) -> None:
    server.delete(key)
    server.xadd(key, {"x": "y"})
    server.xgroup_create(key, GROUP, 0)


@contextmanager
def worker(url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process; it must still be there in the end, and drain when it is told to."""
    with log.open("wb") as stderr:
        command = [sys.executable, str(HERE.parent / "rig" / "brief_worker.py"), url]
        process = subprocess.Popen(command, stderr=stderr)
        try:
            yield process
            if process.poll() is not None:
                raise Failed(f"the worker ended with {process.returncode}")
            process.terminate()
            process.wait(30)
        finally:
            process.kill()
            process.wait()


def fuzz(url: str, *, count: int, seed: str, log: Path, is_thorough: bool = True) -> dict[str, Any]:
    """All of it, on an empty server; returns the report.

    Raises:
        Failed: something was not as it must be.
    """
    with worker(url, log) as process:
        began, run = time.monotonic(), Run(url, seed)
        with Client(url) as client:
            client.result(client.submit("hello"), timeout_s=60)
            (info,) = client.workers()
        run.inbox(count)
        run.records(max(count // 10, 20))
        run.types(info.worker_id, is_thorough=is_thorough)
        with Client(url) as client:
            client.result(client.submit("goodbye"), timeout_s=60)
        if process.poll() is not None:
            raise Failed(f"the worker ended with {process.returncode}")
        if b"Traceback" in (said := log.read_bytes()):
            raise Failed(f"the worker said: {said[-2000:]!r}")
        return {**run.report, "count": count, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--server", default="valkey", choices=["valkey", "redis"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sys.path.append(str(HERE.parent / "rig"))
    from servers import running

    log = Path("fuzz_inbox.log")
    try:
        with running(options.server) as server:
            report = fuzz(server.url, count=options.count, seed=options.seed, log=log)
    except Failed as error:
        print(f"{error}; the worker's log is {log}", file=sys.stderr)
        return 1
    report |= {"server": options.server, "python": platform.python_version()}
    log.unlink()
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
