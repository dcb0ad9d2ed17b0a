"""`Outage`: the server does not answer, or refuses everybody; what all threads do about it.

Of several shards, one that is away is an outage, said once; it is over when all answer.
"""

import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from tokenmill.worker.log import SERVER_BACK, SERVER_LOST, emit

#: Wait before the first and at most before any further try, in seconds.
BACKOFF_S = (0.05, 2.0)


class Outage:
    """Says once that the server is lost and once that it is back; threads share it."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_whole: Callable[[], bool] = lambda: True,
        is_partial: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_whole`: whether every shard has answered the last call to it; `is_partial`: some."""
        self._clock = clock
        self._is_whole = is_whole
        self._is_partial = is_partial
        self._lock = threading.Lock()
        self._since: float | None = None
        self._failures = 0
        self._was_of_all = False
        #: When the last outage of all shards ended; minus infinity when there was none.
        self.ended_at = float("-inf")

    @property
    def is_on(self) -> bool:
        return self._since is not None

    def lost(self, error: RedisError) -> float:
        """A call failed; returns the seconds to wait before the next try."""
        with self._lock:
            is_first = self._since is None
            if self._since is None:
                self._since = self._clock()
            self._was_of_all |= not self._is_partial()
            low, high = BACKOFF_S
            delay = min(low * 2.0 ** min(self._failures, 16), high)
            self._failures += 1
        if is_first:
            emit(SERVER_LOST, error=f"{type(error).__name__}: {error}")
        return delay

    def back(self) -> None:
        """A call succeeded: the server is back, unless one of its shards is still away."""
        if self._since is None or not self._is_whole():
            return
        with self._lock:
            since, self._since, self._failures = self._since, None, 0
            now = self._clock()
            if self._was_of_all:
                self.ended_at, self._was_of_all = now, False
        if since is not None:
            emit(SERVER_BACK, after_s=now - since)
