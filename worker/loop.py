"""`Loop`: the iteration of a worker, on the main thread.

    capacity -> claims -> engine.add -> step -> publish

    thread      does                                             hands over
    intake      claims what fits the capacity offered, tokenizes admissions to the loop
    loop        engine.add, engine.step                          step outputs to the publisher
    publisher   writes tokens, text and ends                     aborts (fenced, cancelled, stop
                                                                 string complete) to the loop

The accelerator waits for nobody: what intake claims during a step enters the next one, and what a
step gave is written during the next one. The loop sleeps only when the engine has nothing to do, or
when the server has been away for so long that the unwritten tokens must not grow further.

A step that fails costs an attempt only the sequence that was alone in it (`worker.probation`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from tokenmill.engine.capacity import Capacity
from tokenmill.engine.engine import StepOutput
from tokenmill.engine.errors import GroupLost
from tokenmill.producer.errors import InvalidRequest, TokenmillError
from tokenmill.producer.params import SamplingParams
from tokenmill.worker.health import Pulse
from tokenmill.worker.inbox import Admission, Inbox
from tokenmill.worker.intake import Intake, Tokenizes
from tokenmill.worker.log import STEP_FAILED, emit
from tokenmill.worker.probation import Probation
from tokenmill.worker.publisher import Publisher

#: Longest sleep of an idle loop: it shows its pulse this often.
IDLE_S = 1.0
#: Different sequences that may fail alone, without a step between them that did not fail, before
#: the engine is given up. One alone may be tried again and again: then it is at fault.
MAX_FAILURES = 3
#: Until what was given back uncounted may be claimed again.
RETRY_MS = 50


class EngineFailed(TokenmillError):
    """One sequence after the other failed alone; another process may do better."""


class EngineLike(Protocol):
    """Of an engine, what a worker needs: the seam at which tests put another."""

    @property
    def model_name(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizes: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def quantization(self) -> str: ...
    @property
    def kv_cache_dtype(self) -> str: ...
    @property
    def has_work(self) -> bool: ...
    def add(
        self,
        seq_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        output_ids: Sequence[int],
        seed: int,
        priority: int,
    ) -> None: ...
    def abort(self, seq_id: str) -> None: ...
    def step(self) -> list[StepOutput]: ...
    def capacity(self) -> Capacity: ...
    def close(self) -> None: ...


class Loop:
    """Runs until `inbox.stop()`; what still runs then is the publisher's to release."""

    def __init__(
        self, engine: EngineLike, inbox: Inbox, intake: Intake, publisher: Publisher, pulse: Pulse
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._intake = intake
        self._publisher = publisher
        self._pulse = pulse
        #: What is in the engine.
        self._running: set[str] = set()
        self._probation = Probation()
        #: Requests that failed alone since the last step that did not fail.
        self._failed: set[str] = set()

    def run(self) -> None:
        """Iterate until told to stop.

        Raises:
            EngineFailed: steps failed, whatever was in them.
            GroupLost: a rank of the engine's group has gone.
        """
        try:
            self._intake.offer(self._engine.capacity())
            while self.turn(IDLE_S):
                pass
        except GroupLost as error:  # what runs may be why: it counts, as when a worker dies
            self._take_out(undo=False, reason=str(error)[:200])
            raise

    def turn(self, idle_s: float = 0.0) -> bool:
        """One iteration; False when it is time to stop."""
        mail = self._inbox.take(0.0 if self._can_step else idle_s)
        self._pulse.beat()
        if mail.is_stopping:
            return False
        for seq_id in mail.aborts:
            self._engine.abort(seq_id)
            if seq_id in self._running:
                self._running.discard(seq_id)
                self._probation.tried(seq_id)
        for admission in mail.admissions:
            self._add(admission)
        if self._can_step:
            self._publish(self._step())
        self._intake.offer(self._capacity(), [a.seq_id for a in mail.admissions])
        return True

    def _capacity(self) -> Capacity:
        capacity = self._engine.capacity()
        if not self._probation.is_on:
            return capacity
        room = 0 if self._running else 1
        return replace(capacity, sequences=min(room, capacity.sequences))

    @property
    def _can_step(self) -> bool:
        return self._engine.has_work and not self._publisher.is_full

    def _add(self, admission: Admission) -> None:
        if self._probation.is_on and self._running:  # claimed before the step failed
            self._publisher.give_back([admission.seq_id], undo=True, delay_ms=RETRY_MS)
            return
        try:
            self._engine.add(
                admission.seq_id,
                admission.prompt_ids,
                admission.params,
                output_ids=admission.output_ids,
                seed=admission.seed,
                priority=admission.priority,
            )
        except InvalidRequest as error:
            self._publisher.fail(admission.seq_id, str(error))
        else:
            self._running.add(admission.seq_id)

    def _step(self) -> list[StepOutput]:
        try:
            outputs = self._engine.step()
        except GroupLost:
            raise
        except Exception as error:  # noqa: BLE001 - a model, a kernel or a driver may raise anything
            self._give_back(error)
            return []
        self._failed.clear()
        return outputs

    def _publish(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._running.discard(output.seq_id)
        if outputs:
            self._publisher.put(outputs)
        if self._probation.is_on:
            self._clear(outputs)

    def _clear(self, outputs: Sequence[StepOutput]) -> None:
        """On probation: let the lone sequence go once it has shown that it does not fail."""
        for output in outputs:
            is_cleared = self._probation.is_cleared(len(output.token_ids))
            if is_cleared or output.finish_reason is not None:
                self._probation.tried(output.seq_id)
                # The last one may stay: it needs to make room for nobody.
                if self._probation.is_on and output.finish_reason is None:
                    self._take_out(undo=True)

    def _give_back(self, error: Exception) -> None:
        """A step failed: count it against the sequence that was alone in it, or find that one."""
        reason = f"a step failed: {type(error).__name__}: {str(error)[:200]}"
        emit(STEP_FAILED, error=reason, sequences=len(self._running))
        suspects = sorted(self._running)
        is_alone = len(suspects) <= 1
        self._take_out(undo=not is_alone, reason=reason)
        if not is_alone:
            self._probation.begin(suspects)
            return
        for seq_id in suspects:
            self._probation.tried(seq_id)
        self._failed.update(seq_id.rpartition("#")[0] for seq_id in suspects)
        if len(self._failed) >= MAX_FAILURES or not suspects:
            raise EngineFailed(
                f"{len(self._failed)} requests in a row failed alone, the last: {reason}"
            ) from error

    def _take_out(self, *, undo: bool, reason: str = "") -> None:
        """Empty the engine; others may try what was in it."""
        for seq_id in self._running:
            self._engine.abort(seq_id)
        delay_ms = RETRY_MS if undo else 0  # counted: the queue's own backoff
        self._publisher.give_back(self._running, reason, undo=undo, delay_ms=delay_ms)
        self._running.clear()
