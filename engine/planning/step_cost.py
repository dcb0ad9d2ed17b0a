"""`StepCost`: what a step takes on a device, as points that were measured or given.

    t = curve(tokens) + sequence_s * sequences + kv_token_s * kv_tokens

The curve joins its points by lines and goes on beyond them with the slope of its last piece. Two
points are the engine's own model, `a + b * tokens`; more of them show the knee at which a device is
saturated. Standard library only.
"""

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

from tokenmill.engine.cost_model import ROWS_PER_READ, CostFit, CostModel, Timing, kv_tokens_read
from tokenmill.producer.errors import InvalidRequest

_EXAMPLE = '{"points": [[tokens, seconds], ...], "kv_token_s": seconds}'


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step.

    Raises:
        InvalidRequest: fewer than two points, points out of order, or times that fall.
    """

    #: (tokens in a step, seconds), by rising tokens.
    points: tuple[tuple[float, float], ...]
    #: Seconds for each token whose keys and values attention reads (`cost_model.kv_tokens_read`).
    kv_token_s: float = 0.0
    #: Queries of one sequence that share one reading of its keys and values.
    rows_per_read: int = ROWS_PER_READ
    #: Seconds of host work for each sequence in the step.
    sequence_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise InvalidRequest("points", "at least two of [tokens, seconds]", len(self.points))
        for (tokens, seconds), (more, later) in pairwise(self.points):
            if not (0 <= tokens < more and 0 <= seconds <= later < math.inf and later > 0):
                raise InvalidRequest(
                    "points",
                    "rising tokens and seconds that never fall",
                    [[tokens, seconds], [more, later]],
                )
        for name in ("kv_token_s", "sequence_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InvalidRequest(name, "seconds of 0 or more", value)

    @classmethod
    def linear(cls, fixed_s: float, token_s: float, kv_token_s: float = 0.0) -> Self:
        """The engine's own model: `fixed_s + token_s * tokens + kv_token_s * kv_tokens`."""
        points = ((0.0, fixed_s), (1.0, fixed_s + token_s))
        return cls(points=points, kv_token_s=kv_token_s)

    @classmethod
    def of_fit(cls, fit: CostFit) -> Self:
        """What an engine has found of its device."""
        return cls.linear(fit.fixed_s, fit.token_s, fit.kv_token_s)

    @classmethod
    def from_mapping(cls, content: Any) -> Self:
        """From plain values, as `to_mapping` gives them.

        Raises:
            InvalidRequest: a field is unknown, missing or wrong.
        """
        try:
            points = tuple((float(tokens), float(seconds)) for tokens, seconds in content["points"])
            return cls(**{**content, "points": points})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest("cost", f"an object like {_EXAMPLE}", str(error)) from error

    def to_mapping(self) -> Mapping[str, Any]:
        """Plain types; undone by `from_mapping`."""
        return asdict(self)

    def seconds(self, chunks: Iterable[tuple[int, int]]) -> float:
        """Seconds of one step of chunks [start, start + length) of different sequences."""
        tokens = kv_tokens = sequences = 0
        for start, length in chunks:
            tokens += length
            kv_tokens += -(-length // self.rows_per_read) * (start + length)
            sequences += 1
        return self._curve(tokens) + self.kv_token_s * kv_tokens + self.sequence_s * sequences

    def cost_model(self, token_budget: int) -> CostModel:
        """What an engine on this device would have fitted, for its scheduler."""
        model = CostModel()
        sizes = sorted({1, 16, 64, 128, 256, token_budget} & set(range(1, token_budget + 1)))
        model.probe(
            Timing(length, kv_tokens_read(start, length), self.seconds([(start, length)]))
            for length in sizes
            for start in (0, 2048)
        )
        return model

    def _curve(self, tokens: float) -> float:
        last = len(self.points) - 1
        right = bisect.bisect_left(self.points, (tokens, -math.inf), 1, last)
        (x0, y0), (x1, y1) = self.points[right - 1], self.points[right]
        return y0 + (y1 - y0) * max(tokens - x0, 0.0) / (x1 - x0)
