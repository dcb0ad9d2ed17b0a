"""`Window`: a bounded number of requests in flight, and their results as they end or in order."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import (
    Busy,
    OutputChanged,
    ServerUnreachable,
    TokenmillError,
)
from tokenmill.producer.follower import Follower
from tokenmill.producer.wire import Delta, Request, Result

#: Before a request that met no server is sent again.
_RETRY_S = 1.0


class Submitter(Protocol):
    """What a window needs of a client."""

    def submit_many(self, requests: list[Request]) -> list[str]: ...
    def cancel(self, request_id: str) -> bool: ...
    def follower(self) -> Follower: ...


class Window:
    """Sends requests while fewer than `size` are unfinished or not yet taken."""

    def __init__(
        self,
        client: Submitter,
        requests: Iterator[Request],
        *,
        size: int,
        ordered: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._requests = requests
        self._size = size
        self._ordered = ordered
        self._clock = clock
        self._follower = client.follower()
        #: Deltas so far of what is in flight.
        self._parts: dict[str, list[Delta]] = {}
        #: In the order of submission: the result once it has ended, until it is taken.
        self._results: dict[str, Result | None] = {}
        #: Taken from `requests` and refused by a full queue or no server, to be sent first.
        self._refused: Request | None = None
        self._retry_at = 0.0
        self._more = True

    def results(self) -> Iterator[Result]:
        """Every result once; whoever leaves the loop early cancels what is in flight."""
        try:
            while self._more or self._results:
                self._fill()
                self._collect()
                yield from self._take()
        finally:
            self._cancel()

    def _cancel(self) -> None:
        for request_id in self._parts:
            try:
                self._client.cancel(request_id)
            except ServerUnreachable:  # the others would only wait as long; deadlines end them
                return
            except TokenmillError:
                continue

    def _fill(self) -> None:
        while self._more and len(self._results) < self._size and self._clock() >= self._retry_at:
            request = self._refused or next(self._requests, None)
            if request is None:
                self._more = False
                return
            try:
                self._client.submit_many([request])
            except (Busy, ServerUnreachable) as error:
                # Sending again is safe: the id is the same.
                wait_s = error.retry_after_s if isinstance(error, Busy) else _RETRY_S
                self._refused = request
                self._retry_at = self._clock() + wait_s
                return
            self._refused = None
            self._parts[request.request_id] = []
            self._results[request.request_id] = None
            self._follower.add(request.request_id)

    def _collect(self) -> None:
        patience_s = MAX_BLOCK_S
        if self._refused:
            patience_s = min(max(self._retry_at - self._clock(), 0.0), MAX_BLOCK_S)
        if not len(self._follower):
            if self._refused:
                time.sleep(patience_s)
            return
        try:
            deltas = self._follower.poll(patience_s)
        except OutputChanged as error:
            self._parts[error.request_id] = []
            self._follower.add(error.request_id)
            return
        for delta in deltas:
            self._parts[delta.request_id].append(delta)
            if delta.finish_reason:
                result = Result.of(self._parts.pop(delta.request_id))
                self._results[delta.request_id] = result

    def _take(self) -> Iterator[Result]:
        for request_id, result in list(self._results.items()):
            if result is not None:
                del self._results[request_id]
                yield result
            elif self._ordered:
                return
