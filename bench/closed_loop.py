"""A closed loop: clients that each send a request, read its tokens, and send the next.

Effective requests/s: those of wall time, times the share of requests whose first token came within
prompt tokens / 128 s and whose moving average of token gaps (exponential, span 16, without the
first token) was always under 1/r s. Tokens that come together count as a gap and zeros.
"""

import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

#: The pace of a first token on a CPU, in prompt tokens a second; r in tokens a second.
PROMPT_RATE, RATES = 128, (1, 2, 4)
SPAN = 16

Request = tuple[list[int], int]
#: Sends a request and gives its tokens as they come.
Stream = Callable[[Request], Iterator[Sequence[int]]]
#: A client's connection to a service.
Connect = Callable[[], AbstractContextManager[Stream]]


@dataclass(frozen=True, slots=True)
class Answer:
    """When the tokens of one request came: seconds since it was sent, for each token."""

    prompt_tokens: int
    times_s: tuple[float, ...]

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.times_s)]

    def is_in_time(self, rate: float) -> bool:
        """Whether it met the terms of `rate` tokens a second."""
        if self.times_s[0] > self.prompt_tokens / PROMPT_RATE:
            return False
        return max(moving_averages(self.gaps_s), default=0.0) < 1 / rate


def moving_averages(values: Sequence[float], span: int = SPAN) -> list[float]:
    """Exponentially weighted means so far, weights normalised (as pandas' `ewm(span=...)`)."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight)
    return averages


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie (the nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


@dataclass(frozen=True, slots=True)
class Point:
    """What a service did under a number of clients."""

    service: str
    clients: int
    requests: int
    seconds: float
    requests_per_s: float
    latency_mean_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    gap_p50_s: float
    gap_p90_s: float
    gap_p95_s: float
    #: For each of `RATES`.
    effective_requests_per_s: Sequence[float]

    def __str__(self) -> str:
        effective = " / ".join(f"{value:.2f}" for value in self.effective_requests_per_s)
        return (
            f"{self.clients:3} clients  {self.service:24} {self.requests_per_s:5.2f} requests/s  "
            f"latency {self.latency_mean_s:5.2f} s  first token P50 {self.first_token_p50_s:.2f} "
            f"P95 {self.first_token_p95_s:.2f} s  gap P50 {self.gap_p50_s:.3f} "
            f"P95 {self.gap_p95_s:.3f} s  effective {effective}"
        )


def measure(service: str, connect: Connect, requests: Sequence[Request], clients: int) -> Point:
    """Run `requests` through `clients` closed loops."""
    rest, lock = iter(requests), threading.Lock()
    answers: list[Answer] = []
    failures: list[BaseException] = []

    def client() -> None:
        try:
            with connect() as stream:
                while not failures:
                    with lock:
                        request = next(rest, None)
                    if request is None:
                        return
                    answers.append(_answered(stream, request))
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    return _point(service, clients, answers, seconds)


def _answered(stream: Stream, request: Request) -> Answer:
    prompt, length = request
    times: list[float] = []
    sent = time.perf_counter()
    for tokens in stream(request):
        times += [time.perf_counter() - sent] * len(tokens)
    if len(times) != length:
        raise SystemExit(f"{length} tokens were asked for, {len(times)} came")
    return Answer(len(prompt), tuple(times))


def _point(service: str, clients: int, answers: Sequence[Answer], seconds: float) -> Point:
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    firsts = [answer.times_s[0] for answer in answers]
    rate = len(answers) / seconds
    in_time = [sum(a.is_in_time(r) for a in answers) / len(answers) for r in RATES]
    return Point(
        service=service,
        clients=clients,
        requests=len(answers),
        seconds=seconds,
        requests_per_s=rate,
        latency_mean_s=statistics.mean(answer.times_s[-1] for answer in answers),
        first_token_p50_s=percentile(firsts, 0.5),
        first_token_p95_s=percentile(firsts, 0.95),
        gap_p50_s=percentile(gaps, 0.5),
        gap_p90_s=percentile(gaps, 0.9),
        gap_p95_s=percentile(gaps, 0.95),
        effective_requests_per_s=tuple(rate * share for share in in_time),
    )
