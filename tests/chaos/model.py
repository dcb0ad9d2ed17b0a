"""`Model`: one request as the protocol means it, without Redis."""

from dataclasses import dataclass, field

from tokenmill.worker.queue import Verdict

MAX_ATTEMPTS = 3


@dataclass
class Model:
    """What a record must be."""

    variant: int
    deadline: int
    tenant: str
    reply_to: str
    #: wait | run | park | end
    state: str = "wait"
    epoch: int = 0
    attempts: int = 0
    worker: str = ""
    #: When it may be claimed again, if it is parked.
    due: int = 0
    is_cancelled: bool = False
    finish: str = ""
    tokens: list[int] = field(default_factory=list)
    #: Whether its reference was taken from its lane.
    is_delivered: bool = False
    #: Whether it is listed among the dead letters.
    is_dead: bool = False

    def is_claimable(self, now: int) -> bool:
        return self.state == "wait" or (self.state == "park" and self.due <= now)

    def ends_at_claim(self, now: int) -> str:
        """How it ends when a claim comes to it; "" if it is given."""
        if self.deadline <= now:
            return "expired"
        return "error" if self.attempts >= MAX_ATTEMPTS else ""

    def is_run_under(self, epoch: int) -> bool:
        return self.state == "run" and self.epoch == epoch

    def claim(self, worker: str) -> None:
        self.state, self.worker = "run", worker
        self.epoch, self.attempts = self.epoch + 1, self.attempts + 1
        self.is_delivered = True

    def append(self, epoch: int, start: int, tokens: tuple[int, ...]) -> Verdict:
        if not self.is_run_under(epoch):
            return Verdict.FENCED
        if self.is_cancelled:
            return Verdict.CANCEL
        if len(self.tokens) >= start + len(tokens):
            return Verdict.OK
        if len(self.tokens) != start:
            return Verdict.GAP
        self.tokens += tokens
        return Verdict.OK

    def end(self, epoch: int, start: int, tokens: tuple[int, ...], finish: str) -> Verdict:
        """By the worker that runs it."""
        if self.state == "end" and self.epoch == epoch:
            return Verdict.OK
        if not self.is_run_under(epoch):
            return Verdict.FENCED
        if len(self.tokens) != start:
            return Verdict.GAP
        self.tokens += tokens
        self._end(finish)
        return Verdict.OK

    def release(self, epoch: int, due: int, *, undo: bool) -> Verdict:
        if self.state == "park" and self.epoch == epoch + 1:
            return Verdict.OK
        if not self.is_run_under(epoch):
            return Verdict.FENCED
        self.park(due)
        if self.state == "park":
            self.attempts -= undo
        return Verdict.OK

    def park(self, due: int) -> None:
        """Taken from its worker."""
        if self.is_cancelled:
            self.end_from_outside("cancelled")
        else:
            self.epoch += 1
            self.state, self.due = "park", due

    def cancel(self) -> bool:
        """Whether it is cancelled, or will be."""
        if self.state == "end":
            return self.finish == "cancelled"
        if self.state == "run":
            self.is_cancelled = True
        else:
            self.end_from_outside("cancelled")
        return True

    def end_from_outside(self, finish: str) -> None:
        """By others than its worker, which is fenced thereby."""
        self.epoch += 1
        self._end(finish)

    def retry(self, deadline: int) -> bool:
        """A dead letter begins anew."""
        if not self.is_dead:
            return False
        self.state, self.finish, self.is_dead, self.is_delivered = "wait", "", False, False
        self.epoch, self.attempts, self.is_cancelled = self.epoch + 1, 0, False
        self.deadline = max(self.deadline, deadline)
        self.tokens.clear()
        return True

    def _end(self, finish: str) -> None:
        self.state, self.finish, self.is_dead = "end", finish, finish == "error"
