"""`StartTimes`: the seconds that the parts of a start take. Standard library only."""

import time
from collections.abc import Callable


class StartTimes:
    """Parts follow one another: each lasts from the end of the one before to its own."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._last = clock()

    def end(self, part: str) -> None:
        """What was done until now was `part`."""
        now = self._clock()
        self.seconds[part] = now - self._last
        self._last = now
