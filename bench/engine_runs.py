"""`EngineRuns`: what was measured of several engines, kept after every run so that it can go on."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from kept_result import kept_result
from workloads import RESULTS, write_result

OURS = "tokenmill"


@dataclass(frozen=True, slots=True)
class Run:
    """One workload through one engine, in one round of all engines in turns."""

    system: str
    workload: str
    round: int
    seconds: float
    tokens_per_s: float
    #: Seconds at the float32 ceilings of this round / seconds, whatever the engine computes in.
    of_roofline: float


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of an engine on a workload; `ratio` is the median of ours / theirs in a round."""

    workload: str
    system: str
    rounds: int
    tokens_per_s: float
    least: float
    most: float
    of_roofline: float
    ratio: float | None

    def __str__(self) -> str:
        ratio = "" if self.ratio is None or self.system == OURS else f"ours {self.ratio:.2f}x"
        return (
            f"{self.workload:3} {self.system:24} {self.tokens_per_s:7.0f} tokens/s "
            f"({self.least:.0f}-{self.most:.0f}, {self.rounds} rounds) "
            f"{self.of_roofline:6.1%} of the float32 roofline  {ratio}"
        )


class EngineRuns:
    """Runs by (system, workload, round), in the JSON result `name`."""

    def __init__(self, name: str, *, resume: bool) -> None:
        #: What the engines say of themselves, and whatever else belongs to the result.
        self.about: dict[str, Any] = {}
        self._name = name
        self._runs: dict[tuple[str, str, int], Run] = {}
        self.path = RESULTS / f"{name}.json"
        if resume and (kept := kept_result(name)):
            self.about = kept["about"]
            for fields in kept["runs"]:
                self._add(Run(**fields))

    def __contains__(self, cell: tuple[str, str, int]) -> bool:
        return cell in self._runs

    def keep(self, run: Run) -> None:
        """Add a run and write the result."""
        self._add(run)
        rows = [asdict(row) for row in self.rows()]
        runs = [asdict(run) for run in self._runs.values()]
        write_result(self._name, None, {"rows": rows, "about": self.about, "runs": runs})

    def rows(self) -> list[Row]:
        """Every engine on every workload, the fastest first."""
        cells = {(run.workload, run.system) for run in self._runs.values()}
        rows = [self._row(*cell) for cell in cells]
        return sorted(rows, key=lambda row: (row.workload, -row.tokens_per_s))

    def _add(self, run: Run) -> None:
        self._runs[run.system, run.workload, run.round] = run

    def _row(self, workload: str, system: str) -> Row:
        theirs = {run.round: run for run in self._of(workload, system)}
        ours = {run.round: run for run in self._of(workload, OURS)}
        rates = [run.tokens_per_s for run in theirs.values()]
        ratios = [theirs[n].seconds / ours[n].seconds for n in theirs if n in ours]
        return Row(
            workload=workload,
            system=system,
            rounds=len(rates),
            tokens_per_s=statistics.median(rates),
            least=min(rates),
            most=max(rates),
            of_roofline=statistics.median(run.of_roofline for run in theirs.values()),
            ratio=statistics.median(ratios) if ratios else None,
        )

    def _of(self, workload: str, system: str) -> list[Run]:
        return [r for r in self._runs.values() if (r.workload, r.system) == (workload, system)]
