"""What the forked processes do: `worker`, `producer`, `reader`, `collector`.

Each may be killed at any instant; all but workers keep a journal from which the next one goes on.
"""

import functools
import heapq
import json
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from failing_engine import FailingEngine
from journal import Journal, news
from mix import REPLIES, Job, job
from mutants import plant
from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, NotFound, OutputChanged, ServerUnreachable
from tokenmill.producer.keys import Keys
from tokenmill.producer.refusals import is_about_the_server
from tokenmill.producer.wire import Result
from tokenmill.worker import output, process, shards
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.queue import Queue

BATCH = 5
#: Outputs here are short: so that they have checkpoints at all.
CHECKPOINT_TOKENS = 16
#: A request that was caught by this many deaths is no poison here.
MAX_ATTEMPTS = 1000


def worker(
    url: str,
    queue: str,
    lease_ms: int,
    step_ms: float,
    first_step_ms: float = 0.0,
    max_num_seqs: int = 16,
    max_attempts: int = MAX_ATTEMPTS,
    failing: float = 0.0,
    mutant: str = "",
) -> int:
    """A whole worker around the scripted engine."""
    configure(as_json=True, level=logging.DEBUG)
    random.seed(os.getpid())
    plant(mutant)
    adapt(max_attempts)
    config = WorkerConfig(model="scripted", redis_url=url, queue=queue, lease_ms=lease_ms)

    def make_engine(_: WorkerConfig) -> FailingEngine:
        return FailingEngine(
            step_s=step_ms / 1000,
            first_step_s=first_step_ms / 1000,
            max_num_seqs=max_num_seqs,
            failing=failing,
        )

    return process.run(config, make_engine=make_engine, waits_for_server=True)


def producer(
    url: str,
    queue: str,
    seed: str,
    directory: str,
    index: int,
    of: int,
    window: int,
    count: int,
    is_lossy: bool = False,
) -> int:
    """Submit the jobs whose number is `index` modulo `of`, at most `window` being live at once.

    Journal: `{"sent": number}` once a submit returned, `{"cancel": number, "ok": bool}`. Ends after
    `count` jobs of all, or when there is a file `stop`, with the line `{"end": true}`. Of a server
    that is `is_lossy` it then submits again what is not known there any more.
    """
    home = Path(directory)
    journal = Journal(home / f"producer-{index}")
    known = [line["sent"] for line in journal.lines if "sent" in line]
    cancelled = {line["cancel"] for line in journal.lines if "cancel" in line}
    following = max(known, default=index - of) + of
    pending = [(0.0, n) for n in known if _is_cancelled(job(seed, n)) and n not in cancelled]
    client = _client(url, queue)
    again: set[int] = set()
    # Whoever was killed may have sent them: they are sent to the end, whatever comes.
    unsaid = _batch(following, of, count)
    while True:
        if not unsaid and not (home / "stop").exists():
            unsaid = _batch(following, of, count)
        try:
            if not unsaid and is_lossy and known:
                known = _resubmit(client, seed, journal, known, again)
                continue
            if not unsaid and not pending:
                journal.write({"end": True})
                return 0
            _cancel_due(client, seed, journal, pending)
            if not unsaid or client.live() >= window:
                time.sleep(0.02)
                continue
            submit(client, [job(seed, number) for number in unsaid])
        except (ServerUnreachable, Busy):
            time.sleep(0.05)
            continue
        for number in unsaid:
            journal.write({"sent": number})
            known.append(number)
            delay = job(seed, number).cancel_after_s
            if delay is not None:
                heapq.heappush(pending, (time.monotonic() + delay, number))
        following = unsaid[-1] + of
        unsaid = []


def reader(
    url: str, queue: str, seed: str, directory: str, index: int, of: int, is_lossy: bool = False
) -> int:
    """Follow, to the end, what the producers sent and has number `index` modulo `of`.

    Journal: `{"n": number, "start":, "tokens":, "text":, "digest":, "finish":}` for each delta; a
    new reader follows on from the offsets in it, and compares the digests. `{"changed": number}`:
    it was told that the output is another now; `{"gone": number}`: that it is not known. Of a
    server that is `is_lossy` it then reads anew from the first token.
    """
    home = Path(directory)
    journal = Journal(home / f"reader-{index}")
    #: Number -> offset and digest of what was read.
    read: dict[int, tuple[int, str]] = {}
    ended: set[int] = set()
    for line in journal.lines:
        if "n" in line:
            read[line["n"]] = line["start"] + len(line["tokens"]), line["digest"]
            if line["finish"]:
                ended.add(line["n"])
        read.pop(line.get("changed", line.get("gone", -1)), None)
    sent = news(home)
    numbers: dict[str, int] = {}
    follower = _client(url, queue).follower()
    while True:
        is_over = False
        for number, is_over in iter(lambda: next(sent), (-1, False)):
            if is_over:
                break
            item = job(seed, number)
            if number % of == index and number not in ended and not item.reply_to:
                numbers[item.request_id] = number
                offset, digest = read.get(number, (0, ""))
                follower.add(item.request_id, offset, digest=digest)
        if is_over and not len(follower):
            return 0
        try:
            deltas = follower.poll(0.1)
        except OutputChanged as error:
            number = numbers[error.request_id]
            journal.write({"changed": number})
            if is_lossy:
                read.pop(number, None)
                follower.add(error.request_id)
            continue
        except NotFound as error:  # it waits in the inbox, or was lost and will be sent again
            number = numbers[error.request_id]
            if is_lossy:
                journal.write({"gone": number})
                read.pop(number, None)
            offset, digest = read.get(number, (0, ""))
            follower.add(error.request_id, offset, digest=digest)
            continue
        if not deltas and not len(follower):
            time.sleep(0.02)
        for delta in deltas:
            read[numbers[delta.request_id]] = delta.end, delta.digest
            journal.write(
                {
                    "n": numbers[delta.request_id],
                    "start": delta.start,
                    "tokens": delta.token_ids,
                    "text": delta.text,
                    "digest": delta.digest,
                    "finish": delta.finish_reason,
                }
            )


def collector(
    url: str, queue: str, seed: str, directory: str, index: int, of: int, is_lossy: bool = False
) -> int:
    """Keep every output of the reply stream, and delete what is kept.

    Journal: `{"n": number, "tokens":, "text":, "finish":}`, once for each request: what was kept
    and not deleted comes again to a new collector. `{"again": number}`: it came twice to one.
    """
    home = Path(directory)
    journal = Journal(home / f"collector-{index}")
    kept = {line["n"] for line in journal.lines if "n" in line}
    client = _client(url, queue)
    replies = client.replies(REPLIES)
    sent = news(home)
    numbers: dict[str, int] = {}
    #: Read, and not known yet: its producer has still to say that it was sent.
    unknown: list[Result] = []
    met: set[int] = set()
    undeleted: list[str] = []
    is_over = False
    while not (is_over and kept >= set(numbers.values()) and not _has_replies(client)):
        for number, is_over in iter(lambda: next(sent), (-1, False)):
            if is_over:
                break
            item = job(seed, number)
            if item.reply_to:
                numbers[item.request_id] = number
        results = unknown + replies.poll(0.1)
        if is_lossy and is_over and not results:  # what was deleted may be there again
            replies = client.replies(REPLIES)
        unknown = [result for result in results if result.request_id not in numbers]
        for result in [result for result in results if result.request_id in numbers]:
            number = numbers[result.request_id]
            if number in met:
                journal.write({"again": number})
            met.add(number)
            if number not in kept:
                line = {"n": number, "tokens": result.token_ids, "text": result.text}
                journal.write({**line, "finish": result.finish_reason})
                kept.add(number)
            undeleted.append(result.request_id)
        try:
            client.forget(undeleted, within_s=86_400)  # the checker still reads the records
            undeleted.clear()
        except ServerUnreachable:
            continue
    return 0


def adapt(max_attempts: int = MAX_ATTEMPTS) -> None:
    """Suit a worker of this process to short outputs and many deaths."""
    for module, name, value in (
        (shards, "Queue", functools.partial(Queue, max_attempts=max_attempts)),
        (output, "CHECKPOINT_TOKENS", CHECKPOINT_TOKENS),
    ):
        if name not in vars(module):
            raise ValueError(f"{module.__name__} must have {name}, or nothing is adapted")
        vars(module)[name] = value


def _client(url: str, queue: str) -> Client:
    while True:
        try:
            return Client(url, queue=queue)
        except ServerUnreachable:
            time.sleep(0.05)


def _batch(following: int, of: int, count: int) -> list[int]:
    return [number for number in range(following, following + BATCH * of, of) if number < count]


def _has_replies(client: Client) -> bool:
    """Whether there are replies, or may come some: what was kept may run again."""
    try:
        return client.live() > 0 or any(
            server.xlen(keys.reply(REPLIES)) for keys, server in client._shards
        )
    except ServerUnreachable:
        return True
    except RedisError as error:
        _unreachable(error)
        return True


def _unreachable(error: RedisError) -> ServerUnreachable:
    """What a client makes of an error that passes; any other is raised as it is."""
    if not is_about_the_server(error):
        raise error
    return ServerUnreachable(str(error))


def _resubmit(
    client: Client, seed: str, journal: Journal, known: list[int], again: set[int]
) -> list[int]:
    """Send again what the server has lost, once; returns what is not to be seen there yet."""
    missing = []
    for number in known:
        item = job(seed, number)
        server = client._shards.server_of(item.request_id)
        try:
            is_there = server.exists(Keys.of(client.queue, item.request_id).record(item.request_id))
        except RedisError as error:
            raise _unreachable(error) from error
        if not is_there:
            missing.append(number)
        if not is_there and number not in again:
            submit(client, [item])
            journal.write({"again": number})
            again.add(number)
    if missing:
        time.sleep(0.2)  # for what goes by the inbox
    return missing


def _is_cancelled(item: Job) -> bool:
    return item.cancel_after_s is not None


def submit(client: Client, jobs: list[Job]) -> None:
    """Enqueue them; some twice, some through the plain inbox."""
    for item in [item for item in jobs if item.is_plain]:
        _add_to_inbox(client, item)
    requests = []
    for item in [item for item in jobs if not item.is_plain]:
        client.tenant = item.tenant
        requests.append(
            client.new_request(
                item.prompt,
                request_id=item.request_id,
                priority=item.priority,
                deadline_s=item.deadline_s,
                reply_to=item.reply_to,
                **_sampling(item),
            )
        )
    client.submit_many(requests)
    if jobs[0].number % 7 == 0:  # once more: it must be a no-op
        client.submit_many(requests)


def _add_to_inbox(client: Client, item: Job) -> None:
    values = {
        "request_id": item.request_id,
        "prompt": item.prompt,
        "params": _sampling(item),
        "tenant": item.tenant,
        "priority": item.priority,
        "deadline_s": item.deadline_s,
        "reply_to": item.reply_to,
    }
    try:
        server = client._shards.server_of(item.request_id)
        server.xadd(Keys.of(client.queue, item.request_id).inbox, {"json": json.dumps(values)})
    except RedisError as error:
        raise _unreachable(error) from error


def _sampling(item: Job) -> dict[str, Any]:
    return {"max_tokens": item.max_tokens, "seed": item.seed}


def _cancel_due(
    client: Client, seed: str, journal: Journal, pending: list[tuple[float, int]]
) -> None:
    while pending and pending[0][0] <= time.monotonic():
        number = pending[0][1]
        heapq.heappop(pending)
        try:
            is_cancelled = client.cancel(job(seed, number).request_id)
        except NotFound:  # it waits in the inbox
            heapq.heappush(pending, (time.monotonic() + 0.2, number))
            continue
        except ServerUnreachable:
            heapq.heappush(pending, (time.monotonic(), number))
            raise
        journal.write({"cancel": number, "ok": is_cancelled})
