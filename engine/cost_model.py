"""`CostModel`: how long a step takes, fitted to steps that were timed. Standard library only.

    t = a + b * tokens + c * kv_tokens

    a           what every step costs
    tokens      tokens that go through the model
    kv_tokens   tokens whose keys and values attention reads: once for each `ROWS_PER_READ` queries

The fit is by least absolute relative error (reweighted least squares), so that a step that was
disturbed by another process does not move it. The steps timed at the start stay in it: they differ
from each other, while those of a steady load tell little about the coefficients.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

#: Queries of one sequence that share one reading of its keys and values.
ROWS_PER_READ = 16
#: Steps that the fit looks back on, and how often it is made again.
HISTORY, REFIT_EVERY = 256, 32
#: Rounds of reweighting, and the relative error below which all weigh the same.
ROUNDS, SMALL_ERROR = 8, 0.01


@dataclass(frozen=True, slots=True)
class Timing:
    """One step and the time that it took."""

    tokens: int
    kv_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CostFit:
    """Coefficients in seconds, and the median relative error over the steps they are fitted to."""

    fixed_s: float = 0.0
    token_s: float = 0.0
    kv_token_s: float = 0.0
    relative_error: float = 0.0
    num_steps: int = 0


def kv_tokens_read(start: int, length: int) -> int:
    """What attention reads for the chunk [start, start + length) of a sequence."""
    return -(-length // ROWS_PER_READ) * (start + length)


class CostModel:
    """Predicts steps; knows nothing until it has observed some."""

    def __init__(self) -> None:
        self.fit = CostFit()
        self._probes: list[Timing] = []
        self._recent: deque[Timing] = deque(maxlen=HISTORY)
        self._until_refit = REFIT_EVERY

    def probe(self, timings: Iterable[Timing]) -> None:
        """Learn from steps that were made up to learn from; they are never forgotten."""
        self._probes += timings
        self.refit()

    def observe(self, timing: Timing) -> None:
        """Learn from a step of the load; the fit follows every `REFIT_EVERY` steps."""
        self._recent.append(timing)
        self._until_refit -= 1
        if self._until_refit <= 0:
            self.refit()

    def refit(self) -> None:
        """Fit to what has been observed; fewer than three steps fit nothing."""
        self._until_refit = REFIT_EVERY
        timings = [*self._probes, *self._recent]
        if len(timings) >= 3:
            self.fit = _fit(timings)

    def seconds_of(self, start: int, length: int) -> float:
        """Seconds by which the chunk [start, start + length) of a sequence makes a step longer."""
        kv_tokens = kv_tokens_read(start, length)
        return self.fit.token_s * length + self.fit.kv_token_s * kv_tokens

    def knee(self, share: float) -> float:
        """Tokens in a step at which it does `share` of the tokens per second of an endless one."""
        if self.fit.token_s <= 0:  # more tokens cost nothing, or nothing is known
            return math.inf if self.fit.num_steps else 0.0
        return share / (1 - share) * self.fit.fixed_s / self.fit.token_s


def _fit(timings: list[Timing]) -> CostFit:
    # Divided by the time: relative errors, so that short steps count as much as long ones.
    rows = [(1 / t.seconds, t.tokens / t.seconds, t.kv_tokens / t.seconds) for t in timings]
    weights = [1.0] * len(rows)
    found = [0.0] * 3
    for _ in range(ROUNDS):
        found = _solve_positive(rows, weights)
        a, b, c = found
        errors = [abs(a * x + b * y + c * z - 1) for x, y, z in rows]
        weights = [1 / max(error, SMALL_ERROR) for error in errors]
    fixed_s, token_s, kv_token_s = found
    return CostFit(fixed_s, token_s, kv_token_s, median(errors), len(rows))


def _solve_positive(rows: list[tuple[float, float, float]], weights: list[float]) -> list[float]:
    """Least squares of `rows @ x = 1`, leaving out coefficients that would become negative."""
    normal = _normal(rows, weights)
    active = [0, 1, 2]
    while active:
        solved = _solve([[normal[i][j] for j in (*active, 3)] for i in active])
        worst = min(range(len(active)), key=solved.__getitem__)
        if solved[worst] >= 0:
            found = dict(zip(active, solved, strict=True))
            return [found.get(i, 0.0) for i in range(3)]
        del active[worst]
    return [0.0] * 3


def _normal(rows: list[tuple[float, float, float]], weights: list[float]) -> list[list[float]]:
    """The weighted normal equations [3, 4], in one pass: a serving engine waits for it."""
    aa = ab = ac = bb = bc = cc = a = b = c = 0.0
    for (x, y, z), weight in zip(rows, weights, strict=True):
        wx, wy, wz = weight * x, weight * y, weight * z
        aa += wx * x
        ab += wx * y
        ac += wx * z
        bb += wy * y
        bc += wy * z
        cc += wz * z
        a += wx
        b += wy
        c += wz
    return [[aa, ab, ac, a], [ab, bb, bc, b], [ac, bc, cc, c]]


def _solve(matrix: list[list[float]]) -> list[float]:
    """Gauss-Jordan on [n, n + 1], rows scaled by their diagonal; a singular one leaves zeros."""
    size = len(matrix)
    scale = [matrix[i][i] ** 0.5 or 1.0 for i in range(size)]
    rows = [
        [value / scale[i] / (scale[j] if j < size else 1.0) for j, value in enumerate(row)]
        for i, row in enumerate(matrix)
    ]
    solved = [0.0] * size
    done: list[int] = []
    for i in range(size):
        if rows[i][i] < 1e-9:  # what remains of the column is a combination of the others
            continue
        done.append(i)
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i], strict=True)]
    for i in done:
        solved[i] = rows[i][size] / scale[i]
    return solved
