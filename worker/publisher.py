"""`Publisher`: a thread that turns tokens into text and writes both to the server.

It owns what this worker holds: a request is opened here before the engine sees it, and leaves with
the verdict on its end. Whatever the server says about a request (fenced, cancelled) reaches the
loop as an abort. The loop hands over what a step gave and never waits for the server.

    first token            written at once
    further tokens         every `flush_s`, up to 64 requests a call
    no tokens for a while  an empty append: it renews the lease and asks whether to go on
    the end                at once, with the last tokens in it
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ParamSpec, TypeVar

from redis.exceptions import RedisError, ResponseError

from tokenmill.engine.engine import StepOutput
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.refusals import is_about_the_server
from tokenmill.worker.inbox import Inbox
from tokenmill.worker.log import FENCED, FINISHED, GAP, REFUSED, RELEASED, emit
from tokenmill.worker.outage import Outage
from tokenmill.worker.output import Output
from tokenmill.worker.queue import MAX_BATCH, Verdict
from tokenmill.worker.shards import QueueLike

FLUSH_S = 0.04
#: Step outputs that may wait for the server before the loop stops stepping: some ten megabytes.
MAX_BACKLOG = 1 << 16
CANCELLED = "cancelled by the producer"

_Item = TypeVar("_Item")
_Given = ParamSpec("_Given")
_Reply = TypeVar("_Reply")


class Abandoned(Exception):
    """The drain has run out of time while the server does not answer."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What the server said of one write that it cannot do, now or later."""

    reason: str


@dataclass(frozen=True, slots=True)
class _GiveBack:
    """These have left the engine before their end."""

    seq_ids: tuple[str, ...]
    reason: str
    undo: bool
    delay_ms: int


class Publisher:
    """Written to by intake and loop, run by its own thread."""

    def __init__(
        self,
        queue: QueueLike,
        inbox: Inbox,
        outage: Outage,
        *,
        is_alive: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`is_alive` says whether the engine makes progress: only then is the lease renewed."""
        self._queue = queue
        self._inbox = inbox
        self._outage = outage
        self._is_alive = is_alive
        self._clock = clock
        self._heartbeat_s = min(1.0, queue.lease_ms / 3000)
        self._changed = threading.Condition()
        self._events: list[Output | Sequence[StepOutput] | _GiveBack] = []
        self._is_draining = False
        self._abandon = threading.Event()
        #: Step outputs handed over and not yet taken.
        self.backlog = 0
        #: Opened and not yet among what is held: sequence id -> request id.
        self._coming: dict[str, str] = {}
        #: What this worker holds, by sequence id: only this thread changes it.
        self._outputs: dict[str, Output] = {}
        #: Of what is held, request id -> sequence id.
        self._seq_ids: dict[str, str] = {}
        self._flush_at = self._heartbeat_at = clock()
        #: Counts for the log and for who asks whether the worker is idle.
        self.num_opened = self.num_finished = self.num_released = self.num_dropped = 0

    @property
    def num_held(self) -> int:
        """Requests opened here and not yet ended, released or lost."""
        return self.num_opened - self.num_finished - self.num_released - self.num_dropped

    def held_ids(self) -> set[str]:
        """The requests in its charge."""
        # In this order, as they go from one to the other. A copy is made in one step.
        coming = self._coming.copy()
        return {*coming.values(), *self._seq_ids.copy()}

    def holds(self, seq_id: str) -> bool:
        """Whether this very claim is in its charge."""
        return seq_id in self._coming or seq_id in self._outputs

    @property
    def is_full(self) -> bool:
        """Whether the loop must not step: the server has been away for too long."""
        return self.backlog >= MAX_BACKLOG

    # -- called by other threads -------------------------------------------------------------

    def open(self, *outputs: Output) -> None:
        """Take charge of claims; comes before any token of them.

        Until then there is nothing to write, so nobody is woken, unless one has ended already.
        """
        with self._changed:
            self.num_opened += len(outputs)
            self._events += outputs
            self._coming.update((output.seq_id, output.request_id) for output in outputs)
            if any(output.finish_reason for output in outputs):
                self._changed.notify()

    def put(self, outputs: Sequence[StepOutput]) -> None:
        """Take what a step gave."""
        with self._changed:
            self._events.append(outputs)
            self.backlog += len(outputs)
            self._changed.notify()

    def fail(self, seq_id: str, reason: str) -> None:
        """End one request as an error, for its own fault."""
        self.put([StepOutput(seq_id, (), FinishReason.ERROR, reason)])

    def give_back(
        self, seq_ids: Iterable[str], reason: str = "", *, undo: bool, delay_ms: int = 0
    ) -> None:
        """Release requests with what they have; arguments as for `Queue.release`."""
        with self._changed:
            self._events.append(_GiveBack(tuple(seq_ids), reason, undo, delay_ms))
            self._changed.notify()

    def drain(self) -> None:
        """Write everything, release what has not ended without counting the attempt, and end."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    def abandon(self) -> None:
        """End without the server's answer."""
        self._abandon.set()

    # -- the thread --------------------------------------------------------------------------

    def run(self) -> None:
        """Publish until drained, or abandoned while the server was lost."""
        try:
            while not self._wait():
                self.turn()
            self._drain()
        except Abandoned:
            return

    def turn(self) -> None:
        """Take what was handed over, and write what is due."""
        if not self._outputs:  # what comes now is asked about after a while, not at once
            self._heartbeat_at = self._clock() + self._heartbeat_s
        for event in self._take():
            if isinstance(event, Output):
                self._replace(event)
            elif isinstance(event, _GiveBack):
                self._release_all(event)
            else:
                self._apply(event)
        self._write(self._clock())

    def _wait(self) -> bool:
        """Until something is due; True when it is time to drain."""
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._is_draining, self._due_in())
            return self._is_draining

    def _due_in(self) -> float:
        if not self._outputs:
            return self._heartbeat_s  # `open` wakes nobody
        is_due = any(output.is_due for output in self._outputs.values())
        due = min(self._flush_at, self._heartbeat_at) if is_due else self._heartbeat_at
        return max(due - self._clock(), 0.0)

    def _take(self) -> list[Output | Sequence[StepOutput] | _GiveBack]:
        with self._changed:
            events, self._events = self._events, []
            was_full, self.backlog = self.is_full, 0
        if was_full:
            self._inbox.wake()
        return events

    def _replace(self, output: Output) -> None:
        """Take charge of a claim, in the place of an earlier one whose loss was not noticed yet."""
        earlier = self._outputs.get(self._seq_ids.get(output.request_id, ""))
        if earlier is not None:
            self._lose(earlier, Verdict.FENCED)
        self._outputs[output.seq_id] = output
        self._seq_ids[output.request_id] = output.seq_id
        self._coming.pop(output.seq_id, None)

    def _drop(self, output: Output) -> None:
        del self._outputs[output.seq_id]
        del self._seq_ids[output.request_id]

    def _apply(self, step: Sequence[StepOutput]) -> None:
        for given in step:
            output = self._outputs.get(given.seq_id)
            if output is None or output.finish_reason:  # fenced, cancelled or stopped meanwhile
                continue
            if given.prompt_logprobs:
                output.feed_prompt(given.prompt_logprobs)
            if given.token_ids:
                output.feed(given.token_ids, given.logprobs)
            if output.is_stopped:
                output.end("stop")
                if given.finish_reason is None:
                    self._inbox.abort(output.seq_id)
            elif given.finish_reason is not None:
                output.end(given.finish_reason.value, given.error)

    def _write(self, now: float) -> None:
        held = self._outputs.values()
        urgent = [o for o in held if o.is_urgent and not o.finish_reason]
        if urgent:
            self._append(urgent)
        self._finish([o for o in held if o.finish_reason])
        if now >= self._flush_at:
            due = [o for o in held if o.is_due]
            if due:
                self._flush_at = now + FLUSH_S
                self._append(due)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + self._heartbeat_s
            if self._is_alive():
                self._append([o for o in held if not o.is_due], is_asking=True)

    def _append(self, outputs: Iterable[Output], *, is_asking: bool = False) -> None:
        for batch in _batches(outputs):
            appends = [o.to_question() if is_asking else o.to_append() for o in batch]
            verdicts = self._ask(self._queue.append, appends)
            for output, append, verdict in zip(batch, appends, verdicts, strict=True):
                if verdict is Verdict.OK:
                    output.written(append)
                elif verdict is Verdict.CANCEL:
                    self._inbox.abort(output.seq_id)
                    output.end("cancelled", CANCELLED)
                else:
                    self._lose(output, verdict)
            self._finish([o for o in batch if o.finish_reason and o.seq_id in self._outputs])

    def _finish(self, outputs: Iterable[Output]) -> None:
        for batch in _batches(outputs):
            ends = [output.to_finish() for output in batch]
            verdicts = self._ask(self._queue.finish, ends)
            for output, end, verdict in zip(batch, ends, verdicts, strict=True):
                if verdict is not Verdict.OK:
                    self._lose(output, verdict)
                    continue
                self._drop(output)
                self.num_finished += 1
                emit(
                    FINISHED,
                    request_id=output.request_id,
                    epoch=output.epoch,
                    finish_reason=output.finish_reason,
                    tokens=end.usage.completion_tokens,
                )

    def _lose(self, output: Output, verdict: Verdict | _Refusal) -> None:
        """The server's record is not where this worker left it, or cannot be written."""
        self._inbox.abort(output.seq_id)
        if isinstance(verdict, _Refusal):
            emit(
                REFUSED,
                request_id=output.request_id,
                epoch=output.epoch,
                reason=verdict.reason,
            )
            self._release(output, undo=False, reason=f"a write was refused: {verdict.reason}")
            return
        if verdict is Verdict.GAP:
            # It rolled back: whoever claims the request next goes on from what the server has.
            emit(GAP, request_id=output.request_id, epoch=output.epoch, start=output.start)
            self._release(output, undo=True)
            return
        emit(FENCED, request_id=output.request_id, epoch=output.epoch)
        self._drop(output)
        self.num_dropped += 1

    def _release_all(self, given: _GiveBack) -> None:
        known = [self._outputs[seq_id] for seq_id in given.seq_ids if seq_id in self._outputs]
        self._finish([output for output in known if output.finish_reason])
        self._append([o for o in known if o.has_unsent and o.seq_id in self._outputs])
        for output in known:
            if output.seq_id in self._outputs:
                self._release(output, undo=given.undo, delay_ms=given.delay_ms, reason=given.reason)

    def _release(self, output: Output, *, undo: bool, delay_ms: int = 0, reason: str = "") -> None:
        self._drop(output)
        try:
            self._call(
                self._queue.release,
                output.request_id,
                output.epoch,
                undo=undo,
                delay_ms=delay_ms,
                reason=reason,
            )
        except ResponseError as error:  # its deadline ends it
            self.num_dropped += 1
            told = f"release: {str(error)[:200]}"
            emit(REFUSED, request_id=output.request_id, epoch=output.epoch, reason=told)
            return
        self.num_released += 1
        emit(
            RELEASED,
            request_id=output.request_id,
            epoch=output.epoch,
            undo=undo,
            reason=reason,
        )

    def _drain(self) -> None:
        self.turn()
        self._append([output for output in self._outputs.values() if output.has_unsent])
        for output in list(self._outputs.values()):
            self._release(output, undo=True)

    def _ask(
        self, call: Callable[[Sequence[_Item]], list[Verdict]], items: Sequence[_Item]
    ) -> list[Verdict | _Refusal]:
        """The verdicts on a batch; when it is refused, on each by itself: one alone is at fault."""
        try:
            return [*self._call(call, items)]
        except ResponseError as error:
            if len(items) == 1:
                return [_Refusal(f"{type(error).__name__}: {str(error)[:200]}")]
        return [verdict for item in items for verdict in self._ask(call, [item])]

    def _call(
        self, call: Callable[_Given, _Reply], *args: _Given.args, **kwargs: _Given.kwargs
    ) -> _Reply:
        """Make a call of the queue until the server answers; it is safe to repeat as it is.

        Raises:
            ResponseError: the server answers that it cannot do this, which no repeat changes.
        """
        while True:
            try:
                reply = call(*args, **kwargs)
            except RedisError as error:
                if not is_about_the_server(error):
                    raise
                if self._abandon.wait(self._outage.lost(error)):
                    raise Abandoned from error
            else:
                self._outage.back()
                return reply


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    waiting = iter(list(items))
    while batch := list(islice(waiting, MAX_BATCH)):
        yield batch
