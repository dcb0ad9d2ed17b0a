"""What bench/splitfuse.py found: as JSON, as tables of docs/benchmarks.md, and as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from page import write_section

from tokenmill.engine.planning.figures import Figures, Sla
from tokenmill.engine.planning.plot import Curve, Panel, draw
from tokenmill.engine.scheduler import Policy

#: Bounds of the step sizes that are summed up together, in tokens.
BINS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
#: The SLA that the claim is about.
MIDDLE = 1
SPLITFUSE, PREFILL_FIRST = Policy.SPLITFUSE.value, Policy.PREFILL_FIRST.value
HEADS = (
    "| policy | clients | req/s | mean latency s | TTFT P50 / P95 s | token gap P50 / P90 / P95 s "
    "| effective req/s, r = {rates} | planned req/s, latency |"
)
#: Planned and measured may differ by so much.
WITHIN = 0.10


@dataclass
class Load:
    """One number of clients of one case and policy."""

    clients: int
    measured: Figures
    predicted: Figures
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def effective(self) -> float:
        return self.measured.effective_per_s[MIDDLE]

    def off(self) -> tuple[float, float]:
        """By how much the plan is off: throughput and mean latency."""
        rate = self.predicted.requests_per_s / self.measured.requests_per_s - 1
        return rate, self.predicted.mean_latency_s / self.measured.mean_latency_s - 1


#: case -> policy -> loads
Loads = Mapping[str, Mapping[str, Sequence[Load]]]


def write_page(
    loads: Loads, slas: Sequence[Sla], content: Mapping[str, Any], *, folder: Path | None
) -> dict[str, object]:
    """Print the outcome, write it under `folder`, and return it as plain values."""
    ratios = {case: ratios_of(policies) for case, policies in loads.items()}
    curve = step_curve(
        step
        for policies in loads.values()
        for rows in policies.values()
        for row in rows
        for step in row.steps
    )
    planned = planner_check(loads)
    for line in (*(f"{case}: {said(found)}" for case, found in ratios.items()), planned):
        print(line)
    if folder is not None:
        text = "\n".join(_lines(loads, slas, content, ratios, planned))
        write_section(folder / "benchmarks.md", "splitfuse", text)
        for case, policies in loads.items():
            _draw_case(case, policies, slas, folder / "figures")
        _draw_steps(curve, folder / "figures")
    cases = {
        case: {policy: [_plain(load) for load in rows] for policy, rows in policies.items()}
        for case, policies in loads.items()
    }
    return {"cases": cases, "ratios": ratios, "planner": planned, "steps": curve}


def _plain(load: Load) -> dict[str, Any]:
    return {
        "clients": load.clients,
        "clients_over_mean_latency": load.clients / load.measured.mean_latency_s,
        "measured": asdict(load.measured) | {"effective_per_s": load.measured.effective_per_s},
        "planned": asdict(load.predicted) | {"effective_per_s": load.predicted.effective_per_s},
    }


def ratios_of(policies: Mapping[str, Sequence[Load]]) -> dict[str, dict[str, float]]:
    """Splitfuse over prefill-first at each number of clients."""
    others = {load.clients: load for load in policies.get(PREFILL_FIRST, ())}
    return {
        str(load.clients): {
            "requests_per_s": load.measured.requests_per_s / other.measured.requests_per_s,
            "mean_latency": load.measured.mean_latency_s / other.measured.mean_latency_s,
            "effective": load.effective / max(other.effective, 1e-3),
            "gap_p95_of_the_other": other.measured.token_gap_s[2] / load.measured.token_gap_s[2],
        }
        for load in policies.get(SPLITFUSE, ())
        if (other := others.get(load.clients)) is not None
    }


def said(ratios: Mapping[str, Mapping[str, float]]) -> str:
    """The ratios of a case in a sentence."""
    if not ratios:
        return "no two policies to compare"
    most = max(ratios, key=lambda clients: ratios[clients]["effective"])
    tail = max(ratios, key=lambda clients: ratios[clients]["gap_p95_of_the_other"])
    latency = [row["mean_latency"] for row in ratios.values()]
    gain = _times(ratios[most]["effective"])
    return (
        f"splitfuse against prefill-first: effective throughput {gain} "
        f"at {most} clients, token gap P95 {ratios[tail]['gap_p95_of_the_other']:.1f} times lower "
        f"at {tail}, mean latency {min(latency):.2f} to {max(latency):.2f} times"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 100 else "over 100 times (of nearly nothing)"


def planner_check(loads: Loads) -> str:
    """Of the loads of splitfuse: how many were planned within 10%, case by case."""
    parts = []
    for case, policies in loads.items():
        offs = [load.off() for load in policies.get(SPLITFUSE, ())]
        good = sum(abs(rate) <= WITHIN and abs(latency) <= WITHIN for rate, latency in offs)
        worst = max((abs(value) for pair in offs for value in pair), default=0.0)
        parts.append(f"{case}: {good} of {len(offs)} loads (worst {worst:.0%})")
    return "planned within 10% of measured throughput and mean latency, " + "; ".join(parts)


def step_curve(steps: Any) -> list[dict[str, float]]:
    """Median seconds of steps by their tokens."""
    found: dict[int, list[tuple[int, float]]] = {}
    for step in steps:
        tokens = sum(length for _, length in step["chunks"])
        for low, high in pairwise(BINS):
            if low <= tokens < high:
                found.setdefault(low, []).append((tokens, step["seconds"]))
    return [
        {
            "tokens": median(tokens for tokens, _ in rows),
            "seconds": median(seconds for _, seconds in rows),
            "steps": len(rows),
        }
        for _, rows in sorted(found.items())
        if len(rows) >= 3
    ]


def _lines(
    loads: Loads,
    slas: Sequence[Sla],
    content: Mapping[str, Any],
    ratios: Mapping[str, Mapping[str, Mapping[str, float]]],
    planned: str,
) -> list[str]:
    rates = " / ".join(f"{sla.token_rate:g}" for sla in slas)
    lines = [f"On {content['server']}; [result](../bench/results/splitfuse.json).", ""]
    for case, policies in loads.items():
        lines += [
            f"### {case} tokens (prompt/output)",
            "",
            f"{said(ratios[case])[0].upper()}{said(ratios[case])[1:]}.",
            "",
            f"![{case}](figures/{_name(case)}.svg)",
            "",
            HEADS.format(rates=rates),
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_row(policy, load) for policy, rows in policies.items() for load in rows]
        lines.append("")
    lines += [f"{planned[0].upper()}{planned[1:]}.", "", "![steps](figures/splitfuse-steps.svg)"]
    return lines


def _row(policy: str, load: Load) -> str:
    seen = load.measured
    rate, latency = load.off()
    cells = (
        policy,
        str(load.clients),
        f"{seen.requests_per_s:.2f}",
        f"{seen.mean_latency_s:.2f}",
        f"{seen.ttft_s[0]:.2f} / {seen.ttft_s[2]:.2f}",
        " / ".join(f"{gap:.3f}" for gap in seen.token_gap_s),
        " / ".join(f"{value:.2f}" for value in seen.effective_per_s),
        f"{rate:+.0%}, {latency:+.0%}",
    )
    return f"| {' | '.join(cells)} |"


def _name(case: str) -> str:
    return f"splitfuse-{case.replace('/', '-')}"


def _draw_case(
    case: str, policies: Mapping[str, Sequence[Load]], slas: Sequence[Sla], folder: Path
) -> None:
    latency, effective, gaps = [], [], []
    for colour, (policy, rows) in enumerate(policies.items()):
        seen = [load.measured for load in rows]
        said = [load.predicted for load in rows]
        # The numbers of clients once: those of the other policies stand beside them.
        notes = [str(load.clients) for load in rows] if policy == SPLITFUSE else []
        for label, figures, is_other in ((policy, seen, False), (f"{policy}, planned", said, True)):
            latency.append(
                Curve(
                    label=label,
                    points=[(one.requests_per_s, one.mean_latency_s) for one in figures],
                    notes=[] if is_other else notes,
                    colour=colour,
                    is_other=is_other,
                )
            )
        effective.append(
            Curve(
                label=policy,
                points=[(load.clients, load.effective) for load in rows],
                colour=colour,
            )
        )
        gaps.append(
            Curve(
                label=policy,
                points=[(load.clients, load.measured.token_gap_s[2]) for load in rows],
                colour=colour,
            )
        )
    rate = slas[MIDDLE].token_rate
    panels = [
        Panel(
            title="latency (numbers: clients)", x="requests/s", y="mean latency, s", curves=latency
        ),
        Panel(title=f"effective, r = {rate:g}", x="clients", y="requests/s", curves=effective),
        Panel(
            title="token gap P95", x="clients", y="seconds", curves=gaps, limit=(1 / rate, "SLA")
        ),
    ]
    paths = [folder / f"{_name(case)}{suffix}" for suffix in (".svg", ".png")]
    draw(f"SmolLM2-135M on 2 cores, {case} tokens, closed loop", panels, paths)


def _draw_steps(curve: Sequence[Mapping[str, float]], folder: Path) -> None:
    if not curve:
        return
    seconds = [(row["tokens"], row["seconds"]) for row in curve]
    rate = [(row["tokens"], row["tokens"] / row["seconds"]) for row in curve]
    knee = 0.9 * max(y for _, y in rate)
    passes = Curve(label="median", points=seconds)
    speed = Curve(label="median", points=rate)
    panels = [
        Panel(title="forward pass", x="tokens", y="seconds", curves=[passes]),
        Panel(
            title="throughput and its knee",
            x="tokens",
            y="tokens/s",
            curves=[speed],
            limit=(knee, "90% of the most"),
        ),
    ]
    paths = [folder / f"splitfuse-steps{suffix}" for suffix in (".svg", ".png")]
    draw("Steps of all policies, by their tokens", panels, paths)
