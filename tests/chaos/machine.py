"""`Protocol`: every call in any order, stale, repeated or wrong, against a model.

Workers here are tickets: every claim that was ever given may still be used, under its epoch, at any
offset. After each step the whole shard must be what the model says. The server's clock is a key
that the test moves.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from model import MAX_ATTEMPTS, Model
from tokenmill.producer.client import Client
from tokenmill.producer.errors import Conflict, NotFound
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator
from tokenmill.producer.params import SamplingParams
from tokenmill.producer.request_id import request_id_for
from tokenmill.producer.wire import Request, Usage, chain_digest, unpack_token_ids
from tokenmill.worker import queue as worker_queue
from tokenmill.worker.queue import Append, Finish, Queue

QUEUE = "machine"
KEYS = Keys(QUEUE)
CLOCK = f"{KEYS.tag}:clock"
LEASE_MS = 1000
MOST = 6
REQUESTS, WORKERS = 8, 2
START_MS, DAY_MS = 1_000_000, 86_400_000
#: How far a producer's clock is ahead of the server's.
SKEW_MS = 7_000
#: Where the request number 1 is answered.
REPLIES = "bulk"

NUMBERS = st.integers(0, REQUESTS - 1)
NAMES = st.integers(0, WORKERS - 1)


@dataclass(frozen=True)
class Ticket:
    """A claim, perhaps of long ago."""

    worker: int
    request_id: str
    epoch: int


class Protocol(RuleBasedStateMachine):
    """Calls of producers and workers, and time."""

    server: redis.Redis
    client: Client

    @initialize()
    def begin(self) -> None:
        self.server.flushdb()
        self.now = START_MS
        self.server.set(CLOCK, self.now)
        # Another clock than the server's, which is the one that counts.
        self.client._exchange.clock = lambda: (self.now + SKEW_MS) / 1000
        self.queues = [
            Queue(self.server, KEYS, f"w{name}", lease_ms=LEASE_MS, max_attempts=MAX_ATTEMPTS)
            for name in range(WORKERS)
        ]
        self.operator = Operator(self.server, KEYS)
        self.models: dict[str, Model] = {}
        self.leases: dict[str, int] = {}
        self.tickets: list[Ticket] = []

    @rule(number=NUMBERS, variant=st.sampled_from([0, 0, 0, 1]), life=st.sampled_from([900, 10**6]))
    def enqueue(self, number: int, variant: int, life: int) -> None:
        request = Request(
            request_id=request_id_for(str(number)),
            prompt=f"variant {variant}",
            params=SamplingParams(max_tokens=MOST),
            tenant=f"t{number % 2}",
            priority=number % 3,
            deadline_ms=self.now + SKEW_MS + life,
            reply_to=REPLIES if number == 1 else "",
        )
        known = self.models.get(request.request_id)
        if known and known.variant != variant:
            with pytest.raises(Conflict):
                self.client.submit_many([request])
            return
        self.client.submit_many([request, request])
        if not known:
            model = Model(variant, self.now + life, request.tenant, request.reply_to)
            self.models[request.request_id] = model

    @rule(name=NAMES, sequences=st.integers(1, 3), is_repeated=st.booleans())
    def claim(self, name: int, sequences: int, is_repeated: bool) -> None:
        free = {i for i, model in self.models.items() if model.is_claimable(self.now)}
        claims = self._claim(name, sequences)
        for given in claims:
            model = self.models[given.request_id]
            assert given.request_id in free
            assert not model.ends_at_claim(self.now)
            model.claim(f"w{name}")
            assert (given.epoch, given.attempts) == (model.epoch, model.attempts)
            assert list(given.token_ids) == model.tokens
            self.tickets.append(Ticket(name, given.request_id, given.epoch))
        rest = free - {given.request_id for given in claims}
        for request_id in rest:
            model = self.models[request_id]
            finish = model.ends_at_claim(self.now)
            if finish and self._state_of(request_id) == "end":
                model.end_from_outside(finish)
        if len(claims) < sequences:
            assert all(self.models[i].state == "end" for i in rest), "left waiting"
        if is_repeated:  # its answer was lost: the same claims, and no others
            self.queues[name]._claim_seq -= 1
            assert self._claim(name, sequences) == claims

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), shift=st.integers(-2, 2), some=st.integers(0, 3), twice=st.booleans())
    def append(self, data: st.DataObject, shift: int, some: int, twice: bool) -> None:
        ticket, model, start = self._draw(data, shift)
        tokens = _tokens(ticket, start, some)
        piece = Append(
            request_id=ticket.request_id,
            epoch=ticket.epoch,
            start=start,
            token_ids=tokens,
            text="x" * some,
            digest=_digest(model, start, tokens),
        )
        expected = model.append(ticket.epoch, start, tokens)
        for _ in range(1 + twice):
            assert self.queues[ticket.worker].append([piece]) == [expected]
        self.leases[f"w{ticket.worker}"] = self.now + LEASE_MS

    @precondition(lambda self: self.tickets)
    @rule(
        data=st.data(),
        shift=st.sampled_from([0, 0, 0, 1, -1]),
        some=st.integers(0, 2),
        finish=st.sampled_from(["length", "stop", "cancelled", "error"]),
        twice=st.booleans(),
    )
    def finish(self, data: st.DataObject, shift: int, some: int, finish: str, twice: bool) -> None:
        ticket, model, start = self._draw(data, shift)
        tokens = _tokens(ticket, start, some)
        end = Finish(
            request_id=ticket.request_id,
            epoch=ticket.epoch,
            start=start,
            token_ids=tokens,
            text="x" * some,
            digest=_digest(model, start, tokens),
            finish_reason=finish,
            usage=Usage(prompt_tokens=1, completion_tokens=start + some),
        )
        expected = model.end(ticket.epoch, start, tokens, finish)
        for _ in range(1 + twice):
            assert self.queues[ticket.worker].finish([end]) == [expected]
        self.leases[f"w{ticket.worker}"] = self.now + LEASE_MS

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), undo=st.booleans(), delay=st.sampled_from([0, 700]), twice=st.booleans())
    def release(self, data: st.DataObject, undo: bool, delay: int, twice: bool) -> None:
        ticket, model, _ = self._draw(data, 0)
        was_run = model.is_run_under(ticket.epoch)
        expected = model.release(ticket.epoch, self.now + delay, undo=undo)
        for _ in range(1 + (twice and model.state == "park")):
            verdict = self.queues[ticket.worker].release(
                ticket.request_id, ticket.epoch, undo=undo, delay_ms=delay
            )
            assert verdict is expected
        if was_run and model.state == "park" and not undo and not delay:
            model.due = self._due_of(ticket.request_id)  # the script's own backoff
            full = 1000 * 2 ** (model.attempts - 1)
            assert full // 2 <= model.due - self.now <= full

    @precondition(lambda self: self.models)
    @rule(number=NUMBERS, twice=st.booleans())
    def cancel(self, number: int, twice: bool) -> None:
        request_id = request_id_for(str(number))
        if request_id not in self.models:
            with pytest.raises(NotFound):
                self.client.cancel(request_id)
            return
        expected = self.models[request_id].cancel()
        for _ in range(1 + twice):
            assert self.client.cancel(request_id) is expected

    @precondition(lambda self: self.models)
    @rule(
        number=NUMBERS,
        action=st.sampled_from(["retry", "retry", "drop", "purge", "pause", "compact"]),
        twice=st.booleans(),
    )
    def operate(self, number: int, action: str, twice: bool) -> None:
        """What operators do, to one request or tenant."""
        for _ in range(1 + twice):
            getattr(self, f"_{action}")(number)

    def _retry(self, number: int) -> None:
        request_id = request_id_for(str(number))
        model = self.models.get(request_id)
        expected = model is not None and model.retry(self.now + DAY_MS)
        told = self.operator.retry([request_id])[request_id]
        assert (told == "OK") == expected

    def _drop(self, number: int) -> None:
        request_id = request_id_for(str(number))
        model = self.models.get(request_id)
        assert self.operator.drop([request_id]) == (model is not None and model.is_dead)
        if model is not None:
            model.is_dead = False

    def _purge(self, number: int) -> None:
        tenant = f"t{number % 2}"
        count = 0
        for model in self.models.values():
            if model.tenant == tenant and model.state in ("wait", "park"):
                model.end_from_outside("cancelled")
                count += 1
        assert self.operator.purge(tenant=tenant).cancelled == count

    def _pause(self, number: int) -> None:
        self.operator.pause()
        assert self._claim(number % WORKERS, 3) == []
        self.operator.resume()

    def _compact(self, number: int) -> None:
        """Changes nothing that is looked at here."""
        self.operator.compact([request_id_for(str(number))])

    @precondition(lambda self: self.leases)
    @rule(name=NAMES, ms=st.sampled_from([LEASE_MS, 0]))
    def renew(self, name: int, ms: int) -> None:
        """A lease, or its end."""
        self.queues[name]._lease(ms)
        self.leases[f"w{name}"] = self.now + ms if ms else 0

    @rule(name=NAMES, twice=st.booleans())
    def reap(self, name: int, twice: bool) -> None:
        dead = [worker for worker, until in self.leases.items() if until <= self.now]
        for worker in dead:
            del self.leases[worker]
        for model in self.models.values():
            if model.state == "run" and model.worker in dead:
                model.park(self.now)
            if model.state != "end" and model.deadline <= self.now:
                model.end_from_outside("expired")
        for _ in range(1 + twice):
            self.queues[name].reap()

    @precondition(lambda self: self.leases)
    @rule(ms=st.sampled_from([1, 400, LEASE_MS, 5000]))
    def wait(self, ms: int) -> None:
        self.now += ms
        self.server.set(CLOCK, self.now)

    @invariant()
    def records_are_the_model(self) -> None:
        for request_id, model in getattr(self, "models", {}).items():
            row: Any = self.server.hmget(
                KEYS.record(request_id), "state", "epoch", "offset", "attempts", "finish"
            )
            state, epoch, offset, attempts, finish = (item or b"" for item in row)
            assert state.decode() == model.state
            assert int(epoch) == model.epoch
            assert int(attempts) == model.attempts
            assert int(offset) == len(model.tokens)
            assert finish.decode() == model.finish
            if model.reply_to:
                self._check_reply(request_id, model)
            else:
                self._check_output(request_id, model)

    @invariant()
    def indexes_are_the_model(self) -> None:
        models = getattr(self, "models", {})
        live = {i: float(m.deadline) for i, m in models.items() if m.state != "end"}
        assert _scores(self.server, KEYS.live) == live
        parked = {i: float(m.due) for i, m in models.items() if m.state == "park"}
        assert _scores(self.server, KEYS.park) == parked
        leases = {worker: float(until) for worker, until in getattr(self, "leases", {}).items()}
        assert _scores(self.server, KEYS.workers) == leases
        for name in range(WORKERS):
            owned: Any = self.server.smembers(KEYS.own(f"w{name}"))
            runs = {i for i, m in models.items() if m.state == "run" and m.worker == f"w{name}"}
            assert {item.decode() for item in owned} == runs
        counts: Any = self.server.hgetall(KEYS.tenants)
        tenants = Counter(model.tenant for model in models.values() if model.state != "end")
        assert {name.decode(): int(number) for name, number in counts.items()} == tenants
        letters: Any = self.server.xrange(KEYS.dead)
        dead = sorted(fields[b"id"].decode() for _, fields in letters)
        assert dead == sorted(i for i, model in models.items() if model.is_dead)
        for request_id, model in models.items():
            self._check_reference(request_id, model)

    def _check_output(self, request_id: str, model: Model) -> None:
        entries: Any = self.server.xrange(KEYS.output(request_id))
        tokens: list[int] = []
        for index, (name, fields) in enumerate(entries):
            tokens += unpack_token_ids(fields[b"t"])
            is_end = model.state == "end" and index == len(entries) - 1
            assert (b"f" in fields) == is_end
            assert name.decode() == f"{len(tokens)}-{int(is_end)}"
            assert fields[b"h"].decode() == chain_digest("", tokens)
        assert tokens == model.tokens
        if model.state == "end":
            assert entries

    def _check_reply(self, request_id: str, model: Model) -> None:
        entries: Any = self.server.xrange(KEYS.reply(REPLIES))
        assert len(entries) == (model.state == "end")
        kept: Any = self.server.hgetall(KEYS.record(request_id))
        starts = kept.get(b"starts", b"").split()
        joined = b"".join(kept[b"tokens:" + start] for start in starts)
        packed, digest = entries[0][1][b"t"] if entries else joined, kept.get(b"digest")
        assert not (entries and starts)
        assert list(unpack_token_ids(packed or b"")) == model.tokens
        assert (digest or b"").decode() == chain_digest("", model.tokens)
        assert not self.server.exists(KEYS.output(request_id))

    def _check_reference(self, request_id: str, model: Model) -> None:
        record: Any = self.server.hmget(KEYS.record(request_id), "entry", "priority", "tenant")
        entry, priority, tenant = (item.decode() for item in record)
        found: Any = self.server.xrange(KEYS.lane(int(priority), tenant), entry, entry)
        if model.state != "end":
            assert found
        elif model.is_delivered:
            assert not found

    def _claim(self, name: int, sequences: int) -> list[worker_queue.Claim]:
        self.leases[f"w{name}"] = self.now + LEASE_MS
        return self.queues[name].claim(sequences=sequences, tokens=10**6, kv_tokens=10**6)

    def _draw(self, data: st.DataObject, shift: int) -> tuple[Ticket, Model, int]:
        # Those that are valid, and those that another claim has overtaken.
        running = [item for item in self.tickets if self.models[item.request_id].state == "run"]
        ticket = data.draw(st.sampled_from([*running, *running, *self.tickets[-3:]]))
        model = self.models[ticket.request_id]
        return ticket, model, max(len(model.tokens) + shift, 0)

    def _state_of(self, request_id: str) -> str:
        state: Any = self.server.hget(KEYS.record(request_id), "state")
        return str(state.decode())

    def _due_of(self, request_id: str) -> int:
        due: Any = self.server.zscore(KEYS.park, request_id)
        return int(due)


def _tokens(ticket: Ticket, start: int, some: int) -> tuple[int, ...]:
    return tuple(1000 * ticket.epoch + start + n for n in range(some))


def _digest(model: Model, start: int, tokens: tuple[int, ...]) -> str:
    return chain_digest("", [*model.tokens[:start], *tokens])


def _scores(server: redis.Redis, key: str) -> dict[str, float]:
    pairs: Any = server.zrange(key, 0, -1, withscores=True)
    return {name.decode(): score for name, score in pairs}
