"""`Figures`: what was seen of a load, measured or simulated. Standard library only.

The definitions are those of the FastGen paper's scripts; where their throughput (clients over the
mean latency) hides how a run begins and ends, requests over wall time stand beside it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from tokenmill.producer.errors import InvalidRequest

#: Span of the moving average of token gaps that an SLA looks at.
EMA_SPAN = 16
#: Of the requests, by the time they were sent, the share at either end whose token gaps do not
#: count; and of each request the first tokens, and the last. The paper dropped 100 of 512.
EDGE, FIRST_TOKENS, LAST_TOKENS = 0.195, 2, 1


@dataclass(slots=True, eq=False)
class Record:
    """One request, as its client saw it; times in seconds on one clock."""

    sent_s: float
    num_prompt_tokens: int
    #: When each token came.
    token_times: list[float] = field(default_factory=list)

    @property
    def latency_s(self) -> float:
        return self.token_times[-1] - self.sent_s

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent_s

    def gaps(self) -> list[float]:
        """Seconds between tokens, one fewer than tokens."""
        return [later - before for before, later in pairwise(self.token_times)]


@dataclass(frozen=True, slots=True)
class Sla:
    """A first token within prompt / `prompt_rate` s, then at least `token_rate` tokens/s."""

    prompt_rate: float
    token_rate: float

    def __post_init__(self) -> None:
        for name in ("prompt_rate", "token_rate"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(name, "tokens per second, above 0", getattr(self, name))

    def is_met(self, record: Record) -> bool:
        """The moving average of the token gaps is the one of pandas, `ewm(span=16)`."""
        if record.ttft_s > record.num_prompt_tokens / self.prompt_rate:
            return False
        return worst_average(record.gaps()) < 1 / self.token_rate


def worst_average(gaps: Iterable[float]) -> float:
    """The largest value of the exponential moving average, normalised for its short past."""
    decay = 1 - 2 / (EMA_SPAN + 1)
    total = weight = worst = 0.0
    for gap in gaps:
        total, weight = gap + decay * total, 1 + decay * weight
        worst = max(worst, total / weight)
    return worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One load: rates per second of wall time, times in seconds, percentiles 50, 90 and 95."""

    requests: int
    wall_s: float
    requests_per_s: float
    #: Prompt and output.
    tokens_per_s: float
    output_tokens_per_s: float
    mean_latency_s: float
    latency_s: tuple[float, float, float]
    ttft_s: tuple[float, float, float]
    token_gap_s: tuple[float, float, float]
    #: Of each SLA: the share of requests that met it.
    met: tuple[float, ...]

    @property
    def effective_per_s(self) -> tuple[float, ...]:
        """Of each SLA: requests/s that met it."""
        return tuple(self.requests_per_s * share for share in self.met)


def figures_of(records: Sequence[Record], slas: Sequence[Sla]) -> Figures:
    """Sum up a run; every request has at least one token."""
    begin = min(record.sent_s for record in records)
    wall_s = max(record.token_times[-1] for record in records) - begin
    output = sum(len(record.token_times) for record in records)
    prompt = sum(record.num_prompt_tokens for record in records)
    return Figures(
        requests=len(records),
        wall_s=wall_s,
        requests_per_s=len(records) / wall_s,
        tokens_per_s=(prompt + output) / wall_s,
        output_tokens_per_s=output / wall_s,
        mean_latency_s=fmean(record.latency_s for record in records),
        latency_s=percentiles([record.latency_s for record in records]),
        ttft_s=percentiles([record.ttft_s for record in records]),
        token_gap_s=percentiles(steady_gaps(records)),
        met=tuple(fmean(sla.is_met(record) for record in records) for sla in slas),
    )


def steady_gaps(records: Sequence[Record]) -> list[float]:
    """Token gaps without those of how a run begins and ends."""
    ordered = sorted(records, key=lambda record: record.sent_s)
    edge = int(EDGE * len(ordered))
    return [
        gap
        for record in ordered[edge : len(ordered) - edge]
        for gap in record.gaps()[FIRST_TOKENS - 1 : -LAST_TOKENS]
    ]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """P50, P90 and P95 by linear interpolation; zeros of nothing."""
    ordered = sorted(values) or [0.0]

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.50), at(0.90), at(0.95)
