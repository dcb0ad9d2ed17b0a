"""`Lengths`, `ClosedLoop` and `OpenLoop`: what is asked of the workers. Standard library only."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tokenmill.producer.errors import InvalidRequest

#: Standard deviation of lengths over their mean, as in the scripts of the FastGen paper.
DEVIATION = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths of requests, normal around their means, drawn by `seed`.

    Raises:
        InvalidRequest: a mean or the number of requests is below one.
    """

    requests: int
    mean_prompt: int
    mean_output: int
    max_prompt: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "mean_prompt", "mean_output", "max_prompt"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, "at least 1", getattr(self, name))

    def draw(self) -> list[tuple[int, int]]:
        """(prompt tokens, output tokens) of every request."""
        draw = random.Random(self.seed)

        def length(mean: int, most: int) -> int:
            return min(max(round(draw.gauss(mean, DEVIATION * mean)), 1), most)

        return [
            (length(self.mean_prompt, self.max_prompt), length(self.mean_output, 1_000_000))
            for _ in range(self.requests)
        ]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Clients that each send a request when their last one has ended."""

    clients: int

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise InvalidRequest("clients", "at least 1", self.clients)

    def first(self, requests: int, seed: int) -> Iterator[float]:
        """When requests are sent that wait for no other, in seconds."""
        draw = random.Random(seed)
        for _ in range(min(self.clients, requests)):
            yield draw.uniform(0, self.clients) * 0.01  # the jitter of the paper's scripts

    @property
    def is_closed(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests that come when they come: a Poisson process of `rate` per second."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < float("inf"):
            raise InvalidRequest("rate", "requests per second, above 0", self.rate)

    def first(self, requests: int, seed: int) -> Iterator[float]:
        """When requests are sent, in seconds."""
        draw = random.Random(seed)
        now = 0.0
        for _ in range(requests):
            now += draw.expovariate(self.rate)
            yield now

    @property
    def is_closed(self) -> bool:
        return False
