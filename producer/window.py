"""`Window`: a bounded number of requests in flight, and their results as they end or in order."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from tokenmill.producer.collecting import Collecting
from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import (
    Busy,
    Conflict,
    NotFound,
    ServerUnreachable,
    TokenmillError,
)
from tokenmill.producer.exchange import KEPT_S
from tokenmill.producer.replies import Replies
from tokenmill.producer.steps import Sleep, Steps, run
from tokenmill.producer.wire import Request, Result

#: Before a request that met no server is sent again.
_RETRY_S = 1.0
#: Most that are sent together, and how soon a source must have given them.
_BATCH, _QUICK_S = 64, 0.01
#: How often a request that the server lost is sent again.
_RESENDS = 3


class Submitter(Protocol):
    """What a window needs of an `Exchange`."""

    def submit_many(self, requests: Iterable[Request]) -> Steps[list[str]]: ...
    def cancel(self, request_id: str) -> Steps[bool]: ...
    def forget(self, request_ids: Sequence[str], within_s: float) -> Steps[None]: ...


class Sliding:
    """Sends requests while fewer than `size` are unfinished or not yet taken."""

    def __init__(
        self,
        exchange: Submitter,
        requests: Iterator[Request],
        replies: Collecting,
        *,
        size: int,
        ordered: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`requests` name the stream of `replies` as their `reply_to`."""
        self._exchange = exchange
        self._requests = requests
        self._replies = replies
        self._size = size
        self._ordered = ordered
        self._clock = clock
        #: In the order of submission: the result once it has ended, until it is taken.
        self._results: dict[str, Result | None] = {}
        #: What is in flight, for when the server loses it.
        self._sent: dict[str, Request] = {}
        #: Lost by the server, to be sent again; and how often each was.
        self._lost: list[Request] = []
        self._resent: Counter[str] = Counter()
        #: Taken from `requests` and not accepted as a whole by a full queue or no server, to be
        #: sent first. Some of them may be in flight.
        self._refused: list[Request] = []
        #: Results of such.
        self._early: dict[str, Result] = {}
        self._retry_at = 0.0
        self._more = True
        #: How many to send together next time.
        self._batch = 1
        #: Taken by the caller, to be deleted from the server.
        self._taken: list[str] = []

    def __bool__(self) -> bool:
        """Whether there may be more results."""
        return bool(self._more or self._results)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight, nor to be sent again."""
        return not (len(self._replies) or self._refused or self._lost)

    def turn(self) -> Steps[None]:
        """Send what there is room for, and receive."""
        yield from self._delete_taken()
        yield from self._fill()
        yield from self._collect()

    def end(self) -> Steps[None]:
        """After the last result."""
        yield from self._delete_taken()

    def cancel(self) -> Steps[None]:
        """End what is in flight."""
        open_ids = [name for name, result in self._results.items() if result is None]
        for request_id in (*open_ids, *(request.request_id for request in self._refused)):
            try:
                yield from self._exchange.cancel(request_id)
            except ServerUnreachable:  # the others would only wait as long; deadlines end them
                return
            except TokenmillError:
                continue

    def _fill(self) -> Steps[None]:
        if self._lost and self._clock() >= self._retry_at:
            if not (yield from self._is_accepted(self._lost)):
                return
            for request in self._lost:
                self._replies.add(request.request_id)
            self._lost = []
        while self._more and len(self._results) < self._size and self._clock() >= self._retry_at:
            batch = self._refused or self._next_batch(self._size - len(self._results))
            if not batch:
                self._more = self._has_more()
                return
            self._refused = batch  # until all are accepted: this may be cancelled halfway
            try:
                if not (yield from self._is_accepted(batch)):
                    return
            except Conflict:  # an id of somebody else, whose request is not ours to cancel
                self._refused = []
                raise
            self._refused = []
            for request in batch:
                result = self._early.pop(request.request_id, None)
                self._results[request.request_id] = result
                if result is None:
                    self._sent[request.request_id] = request
                    self._replies.add(request.request_id)

    def _patience_s(self) -> float:
        """Longest wait for a result."""
        return MAX_BLOCK_S

    def _has_more(self) -> bool:
        """Whether a source that gave nothing may give something later."""
        return False

    def _is_accepted(self, batch: list[Request]) -> Steps[bool]:
        """Send requests; if they are refused, it is safe to do so again: the ids are the same."""
        try:
            yield from self._exchange.submit_many(batch)
        except (Busy, ServerUnreachable) as error:
            wait_s = error.retry_after_s if isinstance(error, Busy) else _RETRY_S
            self._retry_at = self._clock() + wait_s
            return False
        return True

    def _next_batch(self, room: int) -> list[Request]:
        """Some requests to send together; of a source that takes its time, one alone."""
        began = self._clock()
        batch = list(islice(self._requests, min(room, self._batch)))
        is_quick = self._clock() - began < _QUICK_S
        self._batch = min(2 * self._batch, _BATCH) if is_quick else 1
        return batch

    def _collect(self) -> Steps[None]:
        patience_s = self._patience_s()
        if self._refused or self._lost:
            patience_s = min(max(self._retry_at - self._clock(), 0.0), patience_s)
        if not len(self._replies):
            if self._refused or self._lost:
                yield Sleep(patience_s)
            return
        refused = {request.request_id for request in self._refused}
        try:
            results = yield from self._replies.polled(patience_s)
        except NotFound as error:
            self._lose(error)
            return
        for result in results:
            if result.request_id in self._results:
                self._results[result.request_id] = result
                self._sent.pop(result.request_id, None)
            elif result.request_id in refused:
                self._early[result.request_id] = result

    def _lose(self, error: NotFound) -> None:
        """Have a request sent again that the server no longer knows; not for ever."""
        request = self._sent.get(error.request_id)
        if request is None or self._resent[error.request_id] >= _RESENDS:
            raise error
        self._resent[error.request_id] += 1
        self._lost.append(request)

    def take(self) -> Iterator[Result]:
        """What has ended; each is the caller's once it asks for the next."""
        for request_id, result in list(self._results.items()):
            if result is not None:
                del self._results[request_id]
                yield result
                self._taken.append(request_id)
            elif self._ordered:
                return

    def _delete_taken(self) -> Steps[None]:
        if self._taken:
            try:
                yield from self._exchange.forget(tuple(self._taken), KEPT_S)
            except ServerUnreachable:
                return  # tried with the next; in the end its time to live deletes it
            self._taken.clear()


class Window(Sliding):
    """The same for one thread."""

    def __init__(
        self,
        exchange: Submitter,
        requests: Iterator[Request],
        replies: Replies,
        *,
        size: int,
        ordered: bool,
    ) -> None:
        super().__init__(exchange, requests, replies, size=size, ordered=ordered)
        self._perform = replies.perform

    def results(self) -> Iterator[Result]:
        """Every result once; whoever leaves the loop early cancels what is in flight."""
        try:
            while self:
                run(self.turn(), self._perform)
                yield from self.take()
            run(self.end(), self._perform)
        finally:
            run(self.cancel(), self._perform)
