"""`Mill`: producers, readers and workers under faults, at random from a seed.

Fake workers die in silence, come back as zombies after others took their work, lose answers and
repeat every call. A fake token depends on the prompt, the token before it, its position and the
epoch: were a delta of a dead worker let in, the chain of tokens would not fit the epochs written
beside them.
"""

import contextlib
import hashlib
import random
import time
from dataclasses import dataclass, field
from typing import Any

import redis

from tokenmill.producer.keys import Keys
from tokenmill.producer.params import SamplingParams
from tokenmill.producer.request_id import request_id_for
from tokenmill.producer.scripts import Script
from tokenmill.producer.wire import (
    Request,
    Usage,
    chain_digest,
    unpack_token_ids,
)
from tokenmill.worker.queue import Append, Claim, Finish, Queue, Verdict

KEYS = Keys("faults")
REQUESTS = 60
STEPS = 3000
ENQUEUE = Script("tokenmill.producer", "enqueue")
CANCEL = Script("tokenmill.producer", "cancel")


def token(prompt: str, before: int, position: int, epoch: int) -> int:
    text = f"{prompt} {before} {position} {epoch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


class Flaky(redis.Redis):
    """A connection that loses answers, loses calls, and repeats calls, as a network does."""

    rng: random.Random
    faults = 0.0

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        call: Any = super().execute_command
        fault = self.rng.random()
        if arguments[0] != "EVALSHA" or fault >= self.faults:
            return call(*arguments, **options)
        if fault < self.faults / 3:
            raise redis.exceptions.ConnectionError("call lost")
        call(*arguments, **options)
        if fault < self.faults * 2 / 3:
            raise redis.exceptions.TimeoutError("answer lost")
        return call(*arguments, **options)


LOST = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)


@dataclass
class Running:
    """What a worker knows of a request that it runs."""

    claim: Claim
    committed: list[int]
    #: Generated, not yet committed; sent again unchanged until the answer comes.
    fresh: tuple[int, ...] = ()
    ending: str = ""


@dataclass
class FakeWorker:
    """Claims, generates and writes like a worker, one random thing a step."""

    queue: Queue
    rng: random.Random
    running: dict[str, Running] = field(default_factory=dict)
    #: A zombie that was about to end all it ran; others were about to append.
    stopping: bool = False

    def stop(self) -> None:
        self.stopping = True
        for item in self.running.values():
            if not (item.ending or item.fresh):
                item.ending, item.fresh = "stop", extend(item, 1)

    def step(self) -> None:
        with contextlib.suppress(*LOST):
            self.rng.choice([self.claim, self.append, self.append, self.finish, self.release])()

    def claim(self) -> None:
        room = {"sequences": self.rng.randint(0, 6), "tokens": self.rng.randint(0, 60)}
        claims = self.queue.claim(**room, kv_tokens=self.rng.randint(1, 400), limit=8)
        for claim in claims:
            # After a release whose answer was lost it may get back what it believes to run.
            known = self.running.get(claim.request_id)
            assert known is None or known.claim.epoch < claim.epoch
            self.running[claim.request_id] = Running(claim, list(claim.token_ids))

    def append(self) -> None:
        chosen = [item for item in self.running.values() if self.rng.random() < 0.7]
        for item in chosen:
            self.generate(item)
        pieces = [
            Append(
                request_id=item.claim.request_id,
                epoch=item.claim.epoch,
                start=len(item.committed),
                token_ids=item.fresh,
                text=text_of(item.fresh),
                digest=digest_of(item),
            )
            for item in chosen
        ]
        for item, verdict in zip(chosen, self.queue.append(pieces), strict=True):
            self.settle(item, verdict)

    def settle(self, item: Running, verdict: Verdict) -> None:
        request_id = item.claim.request_id
        if verdict is Verdict.OK:
            item.committed += item.fresh
            item.fresh = ()
        elif verdict is Verdict.FENCED:
            del self.running[request_id]
        elif verdict is Verdict.CANCEL:
            item.ending = "cancelled"
        else:
            self.queue.release(request_id, item.claim.epoch, undo=True)
            del self.running[request_id]

    def generate(self, item: Running) -> None:
        request = item.claim.request
        room = request.params.max_tokens - len(item.committed)
        if item.fresh or item.ending:
            return
        item.fresh = extend(item, min(room, self.rng.randint(0, 4)))

    def finish(self) -> None:
        for item in list(self.running.values()):
            left = item.claim.request.params.max_tokens - len(item.committed)
            if not (item.ending or item.fresh) and left <= 4:
                item.ending, item.fresh = "length", extend(item, left)
            if item.ending:
                self.end(item)

    def end(self, item: Running) -> None:
        total = len(item.committed) + len(item.fresh)
        finish = Finish(
            request_id=item.claim.request_id,
            epoch=item.claim.epoch,
            start=len(item.committed),
            token_ids=item.fresh,
            text=text_of(item.fresh),
            digest=digest_of(item),
            finish_reason=item.ending,
            usage=Usage(prompt_tokens=1, completion_tokens=total),
        )
        [verdict] = self.queue.finish([finish])
        assert verdict is not Verdict.CANCEL
        if verdict is Verdict.GAP:
            self.queue.release(item.claim.request_id, item.claim.epoch, undo=True)
        del self.running[item.claim.request_id]

    def release(self) -> None:
        if self.running and self.rng.random() < 0.3:
            item = self.rng.choice(list(self.running.values()))
            undo = self.rng.random() < 0.7
            self.queue.release(item.claim.request_id, item.claim.epoch, undo=undo)
            del self.running[item.claim.request_id]


def extend(item: Running, count: int) -> tuple[int, ...]:
    tokens = list(item.committed)
    for position in range(len(tokens), len(tokens) + count):
        before = tokens[-1] if tokens else 0
        tokens.append(token(str(item.claim.request.prompt), before, position, item.claim.epoch))
    return tuple(tokens[len(item.committed) :])


def text_of(token_ids: tuple[int, ...]) -> str:
    return "".join(f"{token_id}é" for token_id in token_ids)


def digest_of(item: Running) -> str:
    return chain_digest("", (*item.committed, *item.fresh))


@dataclass
class Mill:
    """Producers, workers that live, die and haunt, and a fault at every turn."""

    server: redis.Redis
    flaky: Flaky
    rng: random.Random
    requests: dict[str, Request] = field(default_factory=dict)
    alive: list[FakeWorker] = field(default_factory=list)
    zombies: list[FakeWorker] = field(default_factory=list)
    born: int = 0
    resumed: int = 0

    def run_to_the_end(self) -> None:
        self.run()
        self.drain()
        self.check()

    def run(self) -> None:
        for _ in range(STEPS):
            self.rng.choices(
                [
                    self.work,
                    self.produce,
                    self.kill,
                    self.haunt,
                    self.cancel,
                    self.expire,
                    self.reap,
                ],
                [60, 10, 6, 20, 1, 0.3, 10],
            )[0]()

    def drain(self) -> None:
        """No more faults: everything must come to its end."""
        self.flaky.faults = 0.0
        while len(self.requests) < REQUESTS:
            self.produce()
        for _ in range(3000):
            if not self.server.zcard(KEYS.live):
                break
            self.work()
            self.reap()
        assert self.server.zcard(KEYS.live) == 0
        self.worker().queue.claim(sequences=1, tokens=1, kv_tokens=1)

    def work(self) -> None:
        self.hasten()
        self.worker().step()

    def worker(self) -> FakeWorker:
        while len(self.alive) < 3:
            self.born += 1
            queue = Queue(self.flaky, KEYS, f"w{self.born}", max_attempts=20)
            self.alive.append(FakeWorker(queue, self.rng))
        return self.rng.choice(self.alive)

    def hasten(self) -> None:
        """Backoff is over at once: this test does not wait."""
        parked: Any = self.server.zrange(KEYS.park, 0, -1)
        for request_id in parked:
            self.server.zadd(KEYS.park, {request_id: 0}, xx=True)

    def produce(self) -> None:
        """Enqueue one or a few; each is repeated now and then, and again whenever it was lost."""
        number = self.rng.randrange(REQUESTS)
        batch = [self.request((number + step) % REQUESTS) for step in range(self.rng.randint(1, 3))]
        arguments: list[Any] = [int(time.time() * 1000)]
        for item in batch:
            arguments += [item.request_id, item.fingerprint, item.pack(), item.tenant]
            arguments += [item.priority, item.deadline_ms, item.prompt_cost, item.params.max_tokens]
            arguments.append(item.reply_to)
        try:
            *replies, _ = ENQUEUE(self.flaky, KEYS.tag, arguments)
        except LOST:
            return
        assert set(replies) <= {b"OK", b"DUP"}
        self.requests.update({item.request_id: item for item in batch})

    def request(self, number: int) -> Request:
        return Request(
            request_id=request_id_for(str(number)),
            prompt=f"prompt {number}",
            params=SamplingParams(max_tokens=1 + number * 7 % 50),
            tenant=f"t{number % 4}",
            priority=number % 3,
            deadline_ms=int(time.time() + 3600) * 1000,
        )

    def kill(self) -> None:
        """Its lease runs out; half of them do not know that they are dead."""
        if not self.alive:
            return
        worker = self.alive.pop(self.rng.randrange(len(self.alive)))
        self.server.zadd(KEYS.workers, {worker.queue.worker_id: 1})
        if self.rng.random() < 0.7:
            self.zombies.append(worker)
            if self.rng.random() < 0.5:
                worker.stop()
        if self.rng.random() < 0.7:
            self.reap()
        self.resumed += any(item.committed for item in worker.running.values())

    def haunt(self) -> None:
        """A zombie goes on with what it believes to run; in the end it dies for good."""
        if self.zombies:
            zombie = self.rng.choice(self.zombies)
            with contextlib.suppress(*LOST):
                (zombie.finish if zombie.stopping else zombie.append)()
            if self.rng.random() < 0.2:
                self.zombies.remove(zombie)
                self.server.zadd(KEYS.workers, {zombie.queue.worker_id: 1})

    def cancel(self) -> None:
        if self.requests:
            with contextlib.suppress(*LOST):
                CANCEL(self.flaky, KEYS.tag, [self.rng.choice(list(self.requests))])

    def expire(self) -> None:
        live: Any = self.server.zrange(KEYS.live, 0, -1)
        if live:
            request_id = self.rng.choice(live).decode()
            self.server.zadd(KEYS.live, {request_id: 1})
            self.server.hset(KEYS.record(request_id), "deadline", 1)

    def reap(self) -> None:
        with contextlib.suppress(*LOST):
            self.worker().queue.reap()

    def check(self) -> None:
        """Every request has one whole, gapless output with one end, and nothing else is left."""
        for request_id, request in self.requests.items():
            check_output(self.server, request_id, request)
        kept = ("r", "o", "ctl", "dead", "workers", "w")
        names = [key.decode().removeprefix(KEYS.tag + ":") for key in self.server.scan_iter()]
        assert [name for name in names if name.partition(":")[0] not in kept] == []


def check_output(server: redis.Redis, request_id: str, request: Request) -> None:
    entries: Any = server.xrange(KEYS.output(request_id))
    tokens: list[int] = []
    epoch = 0
    for index, (name, fields) in enumerate(entries):
        last = index == len(entries) - 1
        assert int(fields[b"e"]) >= epoch, "a delta of an older epoch after a newer"
        epoch = int(fields[b"e"])
        piece = unpack_token_ids(fields[b"t"])
        for position, token_id in enumerate(piece, len(tokens)):
            before = tokens[-1] if tokens else 0
            expected = token(str(request.prompt), before, position, epoch)
            assert token_id == expected, "a token that its epoch did not generate"
            tokens.append(token_id)
        assert name.decode() == f"{len(tokens)}-{int(last)}"
        assert fields[b"x"].decode() == text_of(piece)
        assert fields[b"h"].decode() == chain_digest("", tokens)
        assert (b"f" in fields) == last
    check_end(server, request_id, request, tokens)


def check_end(server: redis.Redis, request_id: str, request: Request, tokens: list[int]) -> None:
    record: Any = server.hgetall(KEYS.record(request_id))
    assert record[b"state"] == b"end"
    assert int(record[b"offset"]) == len(tokens)
    if record[b"finish"] == b"length":
        assert len(tokens) == request.params.max_tokens
    assert (b"payload" in record) == (record[b"finish"] == b"error")
    assert server.pttl(KEYS.record(request_id)) > 0
    assert server.pttl(KEYS.output(request_id)) > 0
