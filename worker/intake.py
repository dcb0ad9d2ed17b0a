"""`Intake`: a thread that claims what fits, tokenizes it, and hands it to the loop.

The loop offers the engine's capacity after each step. While the next step runs, that offer, less
what was claimed since and has not reached the engine, is what may be claimed:

    room = capacity offered - (claimed, and not in that capacity yet)

Without room the thread sleeps until the next offer; without work, on the control stream. Renewing
the lease and reaping are done on the side. All of it stops while the engine makes no progress, so
that a hung worker loses its lease like a dead one.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from redis.exceptions import RedisError

from tokenmill.engine.capacity import Capacity
from tokenmill.engine.detokenizer import Decodes
from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams, derived_seed
from tokenmill.producer.prompt import is_chat, plain_prompt
from tokenmill.producer.wire import Request
from tokenmill.worker.inbox import Admission, Inbox
from tokenmill.worker.log import CLAIMED, DISOWNED, IDLE, REAPED, emit
from tokenmill.worker.outage import Outage
from tokenmill.worker.output import Output, seq_id_of
from tokenmill.worker.publisher import Publisher
from tokenmill.worker.queue import Claim
from tokenmill.worker.shards import QueueLike

#: With work in the engine and nothing claimable, look again after this: what did not fit before
#: fits when something ends, and that wakes nobody.
BUSY_WAIT_S = 0.1
#: Log probabilities that are told of one prompt: they travel as one entry of up to 2 MB.
MAX_PROMPT_LOGPROBS = 200_000
#: Claims are handed over together, but the first of them waits no longer than this for the others
#: to be tokenized.
HAND_OVER_S = 0.002
#: New tokens that a claim reserves KV memory for, as the claim script does.
KV_RESERVE = 256


class Tokenizes(Decodes, Protocol):
    """Of a tokenizer, what a worker needs."""

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Room:
    """What may be claimed now."""

    sequences: int = 0
    tokens: int = 0
    kv_tokens: int = 0

    def __bool__(self) -> bool:
        return self.sequences > 0 and self.tokens > 0 and self.kv_tokens > 0

    def plus(self, other: "Room") -> "Room":
        return Room(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.kv_tokens + other.kv_tokens,
        )

    def less(self, other: "Room") -> "Room":
        return Room(
            self.sequences - other.sequences,
            self.tokens - other.tokens,
            self.kv_tokens - other.kv_tokens,
        )


class Intake:
    """Offered capacity by the loop, run by its own thread."""

    def __init__(
        self,
        queue: QueueLike,
        inbox: Inbox,
        publisher: Publisher,
        outage: Outage,
        *,
        tokenizer: Tokenizes,
        model: str,
        adapters: Sequence[str] = (),
        exit_when_idle_s: float | None = None,
        is_alive: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._inbox = inbox
        self._publisher = publisher
        self._outage = outage
        self._tokenizer = tokenizer
        self._model = model
        self._adapters = adapters
        self._exit_when_idle_s = exit_when_idle_s
        self._is_alive = is_alive
        self._clock = clock
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._offered = Room()
        #: KV tokens of the idle engine: the most that was ever offered.
        self._kv_total = 0
        #: KV tokens that one sequence holds at the most, however long; 0: no such bound.
        self._kv_each = 0
        #: Claimed, and not in the offered capacity: sequence id -> what it takes; and their sum.
        self._held: dict[str, Room] = {}
        self._held_sum = Room()
        self._upkeep_s = queue.lease_ms / 3000
        self._upkeep_at = clock()
        #: Since when nothing was held and nothing could be claimed; None: not idle.
        self._idle_since: float | None = None

    # -- called by other threads -------------------------------------------------------------

    def offer(self, capacity: Capacity, admitted: Iterable[str] = ()) -> None:
        """Say what the engine can take, the sequences `admitted` being in it already."""
        kv_tokens = capacity.blocks * capacity.block_size
        with self._changed:
            for seq_id in admitted:
                self._held_sum = self._held_sum.less(self._held.pop(seq_id, Room()))
            self._offered = Room(capacity.sequences, capacity.tokens, kv_tokens)
            self._kv_total = max(self._kv_total, kv_tokens)
            self._kv_each = capacity.kv_tokens_each
            if self._room():
                self._changed.notify()

    def stop(self) -> None:
        """Claim nothing more, and end."""
        self._stopping.set()
        with self._changed:
            self._changed.notify()

    # -- the thread --------------------------------------------------------------------------

    def run(self) -> None:
        """Claim until stopped."""
        while not self._stopping.is_set():
            try:
                self.turn()
            except RedisError as error:
                if not self._stopping.is_set():
                    delay_s = self._outage.lost(error)
                    # One shard is tried again in its own time, and keeps nobody from the others.
                    self._stopping.wait(0.0 if self._queue.is_reachable_in_part else delay_s)

    def turn(self) -> None:
        """Claim once, or wait for what makes it worth while."""
        if not self._is_alive():
            self._stopping.wait(self._upkeep_s)
            return
        self._keep_up()
        room = self._await_room()
        if not room:
            self._idle_since = None
            return
        was_idle = not self._publisher.num_held
        claims = self._queue.claim(
            sequences=room.sequences,
            tokens=room.tokens,
            kv_tokens=room.kv_tokens,
            kv_total=self._kv_total,
            kv_each=self._kv_each,
        )
        self._outage.back()
        self._take(claims)
        was_fed = bool(self._queue.num_inbox) and self._queue.admit() > 0
        if claims or was_fed or not was_idle or not self._queue.is_whole:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = self._clock()
        if not claims and not was_fed:
            self._await_work(is_idle=was_idle)

    def _keep_up(self) -> None:
        """Renew the lease and reap, every third of a lease and not all workers at once.

        What one shard does not answer is raised when all is done on the others.
        """
        now = self._clock()
        if now < self._upkeep_at:
            return
        self._upkeep_at = now + self._upkeep_s * random.uniform(0.8, 1.0)
        errors: list[RedisError] = []
        for duty in (self._renew, self._disown, self._reap):
            try:
                duty()
            except RedisError as error:
                errors.append(error)
                if not self._queue.is_reachable_in_part:
                    break
        if errors:
            raise errors[0]

    def _renew(self) -> None:
        self._queue.renew()
        self._outage.back()

    def _disown(self) -> None:
        strays = self._queue.disown(self._publisher.held_ids())
        if strays:
            emit(DISOWNED, requests=strays)

    def _reap(self) -> None:
        # After an outage every lease looks run out: let the others renew theirs first.
        if self._clock() - self._outage.ended_at <= self._queue.lease_ms / 1000:
            return
        moved = self._queue.reap()
        if moved:
            emit(REAPED, requests=moved)

    def _room(self) -> Room:
        return self._offered.less(self._held_sum)

    def _await_room(self) -> Room:
        """What may be claimed, waiting for it until the next upkeep."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping.is_set() or self._room(),
                max(self._upkeep_at - self._clock(), 0.01),
            )
            return Room() if self._stopping.is_set() else self._room()

    def _await_work(self, *, is_idle: bool) -> None:
        timeout_s = min(MAX_BLOCK_S, self._upkeep_s) if is_idle else BUSY_WAIT_S
        if self._idle_since is not None and self._exit_when_idle_s is not None:
            left = self._idle_since + self._exit_when_idle_s - self._clock()
            if left <= 0:
                emit(IDLE, idle_s=self._exit_when_idle_s)
                self._inbox.stop()
                self._stopping.set()
                return
            timeout_s = min(timeout_s, left)
        self._queue.wait(timeout_s)

    def _take(self, claims: Sequence[Claim]) -> None:
        """Tokenize claims and hand them over, many at once but none late."""
        ready: list[tuple[Output, Admission | None]] = []
        again: list[Claim] = []
        began = self._clock()
        for claim in claims:
            if self._publisher.holds(seq_id_of(claim)):
                again.append(claim)
                continue
            ready.append(self._prepare(claim))
            if self._clock() - began > HAND_OVER_S:
                self._hand_over(ready)
                ready, began = [], self._clock()
        self._hand_over(ready)
        for claim in again:
            # The server rolled back and gave the same claim again. Given back, its next epoch
            # fences what runs here.
            self._queue.release(claim.request_id, claim.epoch, undo=True)

    def _hand_over(self, ready: Sequence[tuple[Output, Admission | None]]) -> None:
        admissions = [admission for _, admission in ready if admission]
        with self._changed:
            for admission in admissions:
                held = _room_of(admission, self._kv_each)
                self._held[admission.seq_id] = held
                self._held_sum = self._held_sum.plus(held)
        self._publisher.open(*(output for output, _ in ready))
        if admissions:
            self._inbox.admit(*admissions)

    def _prepare(self, claim: Claim) -> tuple[Output, Admission | None]:
        """Tokenize a claim; what is wrong with it ends it, and nothing else."""
        reason = ""
        prompt_ids: list[int] = []
        params = claim.request.params
        try:
            params = self._params(claim.request)
            prompt_ids = self._prompt_ids(claim.request)
            _check_told(params, len(prompt_ids))
        except InvalidRequest as error:
            reason = str(error)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no `Exception`
            reason = f"prompt cannot be tokenized: {type(error).__name__}"
        output = Output(claim, self._tokenizer, prompt_tokens=len(prompt_ids))
        emit(
            CLAIMED,
            request_id=claim.request_id,
            epoch=claim.epoch,
            attempts=claim.attempts,
            prompt_tokens=len(prompt_ids),
            committed=len(claim.token_ids),
        )
        if reason:
            output.end("error", reason)
        elif output.is_stopped:  # a worker died between the last token and the end
            output.end("stop")
        else:
            return output, Admission(
                seq_id=output.seq_id,
                prompt_ids=tuple(prompt_ids),
                output_ids=claim.token_ids,
                params=params,
                seed=derived_seed(claim.request_id) if params.seed is None else params.seed,
                priority=claim.request.priority,
            )
        return output, None

    def _params(self, request: Request) -> SamplingParams:
        """With the adapter that the request names as its model, as clients of OpenAI's do."""
        params, model = request.params, request.model
        if model in ("", self._model):
            return params
        if model not in self._adapters:
            others = f" or one of its adapters ({', '.join(self._adapters)})"
            expected = f"{self._model!r}{others if self._adapters else ''}, as served here"
            raise InvalidRequest("model", expected, model)
        if params.adapter not in ("", model):
            raise InvalidRequest("adapter", f"{model!r}, as the model is", params.adapter)
        return replace(params, adapter=model)

    def _prompt_ids(self, request: Request) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        plain = list(plain_prompt(prompt))
        if is_chat(prompt):
            return self._tokenizer.apply_chat_template(plain, request.tools)
        return plain


def _room_of(admission: Admission, kv_each: int) -> Room:
    """What a sequence takes that the engine has not counted yet."""
    tokens = len(admission.prompt_ids) + len(admission.output_ids)
    still = max(admission.params.max_tokens - len(admission.output_ids), 0)
    kv_tokens = tokens + min(still, KV_RESERVE)
    return Room(1, tokens, min(kv_tokens, kv_each) if kv_each else kv_tokens)


def _check_told(params: SamplingParams, num_prompt_tokens: int) -> None:
    if params.prompt_logprobs is not None:
        values = num_prompt_tokens * (params.prompt_logprobs + 1)
        if values > MAX_PROMPT_LOGPROBS:
            expected = f"at most {MAX_PROMPT_LOGPROBS} values"
            raise InvalidRequest("prompt_logprobs", expected, values, "ask for fewer")
