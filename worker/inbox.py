"""`Inbox`: what the other threads tell the loop. The one lock that the loop ever waits for."""

import threading
from dataclasses import dataclass

from tokenmill.producer.params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A claimed request, tokenized: the arguments of `Engine.add`."""

    seq_id: str
    prompt_ids: tuple[int, ...]
    #: Tokens that earlier epochs have committed.
    output_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    priority: int


@dataclass(frozen=True, slots=True)
class Mail:
    """Everything that has come since the last look."""

    admissions: tuple[Admission, ...] = ()
    aborts: tuple[str, ...] = ()
    is_stopping: bool = False


class Inbox:
    """Written by intake, publisher and signals; read by the loop.

    Bounded by its writers: intake admits what the loop has offered room for, and the publisher
    aborts a sequence once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._admissions: list[Admission] = []
        self._aborts: list[str] = []
        self._is_stopping = False
        self._is_woken = False

    def admit(self, *admissions: Admission) -> None:
        """Hand sequences to the engine."""
        with self._changed:
            self._admissions += admissions
            self._changed.notify()

    def abort(self, seq_id: str) -> None:
        """Take a sequence from the engine; one that is not there is no error."""
        with self._changed:
            self._aborts.append(seq_id)
            self._changed.notify()

    def stop(self) -> None:
        """End the loop after the step it is in."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def wake(self) -> None:
        """Let the loop look again at what made it wait."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def take(self, timeout_s: float = 0.0) -> Mail:
        """Everything there is, waiting up to `timeout_s` for the first."""
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(self._has_mail, timeout_s)
            mail = Mail(tuple(self._admissions), tuple(self._aborts), self._is_stopping)
            self._admissions, self._aborts, self._is_woken = [], [], False
        return mail

    def _has_mail(self) -> bool:
        return bool(self._admissions or self._aborts or self._is_stopping or self._is_woken)
