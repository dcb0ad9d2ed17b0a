"""`Window`: a bounded number of requests in flight, and their results as they end or in order."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import Busy, ServerUnreachable, TokenmillError
from tokenmill.producer.replies import Replies
from tokenmill.producer.wire import Request, Result

#: Before a request that met no server is sent again.
_RETRY_S = 1.0
#: Most that are sent together, and how soon a source must have given them.
_BATCH, _QUICK_S = 64, 0.01


class Submitter(Protocol):
    """What a window needs of a client."""

    def submit_many(self, requests: list[Request]) -> list[str]: ...
    def cancel(self, request_id: str) -> bool: ...


class Window:
    """Sends requests while fewer than `size` are unfinished or not yet taken."""

    def __init__(
        self,
        client: Submitter,
        requests: Iterator[Request],
        replies: Replies,
        *,
        size: int,
        ordered: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`requests` name the stream of `replies` as their `reply_to`."""
        self._client = client
        self._requests = requests
        self._replies = replies
        self._size = size
        self._ordered = ordered
        self._clock = clock
        #: In the order of submission: the result once it has ended, until it is taken.
        self._results: dict[str, Result | None] = {}
        #: Taken from `requests` and refused by a full queue or no server, to be sent first.
        self._refused: list[Request] = []
        self._retry_at = 0.0
        self._more = True
        #: How many to send together next time.
        self._batch = 1
        #: Taken by the caller, to be deleted from the server.
        self._taken: list[str] = []

    def results(self) -> Iterator[Result]:
        """Every result once; whoever leaves the loop early cancels what is in flight."""
        try:
            while self._more or self._results:
                self._fill()
                self._collect()
                yield from self._take()
                self._delete_taken()
        finally:
            self._cancel()

    def _cancel(self) -> None:
        for request_id, result in self._results.items():
            if result is not None:
                continue
            try:
                self._client.cancel(request_id)
            except ServerUnreachable:  # the others would only wait as long; deadlines end them
                return
            except TokenmillError:
                continue

    def _fill(self) -> None:
        while self._more and len(self._results) < self._size and self._clock() >= self._retry_at:
            batch = self._refused or self._next_batch(self._size - len(self._results))
            if not batch:
                self._more = False
                return
            try:
                self._client.submit_many(batch)
            except (Busy, ServerUnreachable) as error:
                # Sending again is safe: the ids are the same.
                wait_s = error.retry_after_s if isinstance(error, Busy) else _RETRY_S
                self._refused = batch
                self._retry_at = self._clock() + wait_s
                return
            self._refused = []
            for request in batch:
                self._results[request.request_id] = None
                self._replies.add(request.request_id)

    def _next_batch(self, room: int) -> list[Request]:
        """Some requests to send together; of a source that takes its time, one alone."""
        began = self._clock()
        batch = list(islice(self._requests, min(room, self._batch)))
        is_quick = self._clock() - began < _QUICK_S
        self._batch = min(2 * self._batch, _BATCH) if is_quick else 1
        return batch

    def _collect(self) -> None:
        patience_s = MAX_BLOCK_S
        if self._refused:
            patience_s = min(max(self._retry_at - self._clock(), 0.0), MAX_BLOCK_S)
        if not len(self._replies):
            if self._refused:
                time.sleep(patience_s)
            return
        for result in self._replies.poll(patience_s):
            if result.request_id in self._results:
                self._results[result.request_id] = result

    def _take(self) -> Iterator[Result]:
        for request_id, result in list(self._results.items()):
            if result is not None:
                del self._results[request_id]
                yield result
                self._taken.append(request_id)
            elif self._ordered:
                return

    def _delete_taken(self) -> None:
        if self._taken:
            try:
                self._replies.done(self._taken)
            except ServerUnreachable:
                return  # tried with the next; in the end its time to live deletes it
            self._taken.clear()
