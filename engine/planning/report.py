"""Loads as rows, as a table and as panels of a plot. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tokenmill.engine.planning.figures import Sla
from tokenmill.engine.planning.load import ClosedLoop
from tokenmill.engine.planning.plot import Curve, Panel
from tokenmill.engine.planning.sizing import Point


def row_of(point: Point, slas: Sequence[Sla]) -> Mapping[str, Any]:
    """Plain values of one load."""
    figures = point.figures
    return {
        **asdict(point.loop),
        **asdict(figures),
        "effective_per_s": {
            f"{sla.token_rate:g}": rate
            for sla, rate in zip(slas, figures.effective_per_s, strict=True)
        },
        "busy": point.busy,
        "num_steps": point.num_steps,
        "num_preemptions": point.num_preemptions,
    }


def table_of(points: Sequence[Point], slas: Sequence[Sla]) -> str:
    """Lines of columns; times in seconds."""
    rates = " / ".join(f"{sla.token_rate:g}" for sla in slas)
    heads = (
        "load",
        "req/s",
        "tokens/s",
        "mean latency",
        "TTFT P50 / P95",
        "token gap P50 / P90 / P95",
        f"effective req/s at {rates} tokens/s",
        "busy",
    )
    rows = [heads, *(_cells(point) for point in points)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _cells(point: Point) -> tuple[str, ...]:
    figures, loop = point.figures, point.loop
    name = f"{loop.clients} clients" if isinstance(loop, ClosedLoop) else f"{loop.rate:g} /s"
    return (
        name,
        f"{figures.requests_per_s:.3g}",
        f"{figures.tokens_per_s:,.0f}",
        f"{figures.mean_latency_s:.2f}",
        f"{figures.ttft_s[0]:.2f} / {figures.ttft_s[2]:.2f}",
        " / ".join(f"{gap:.3f}" for gap in figures.token_gap_s),
        " / ".join(f"{rate:.3g}" for rate in figures.effective_per_s),
        f"{point.busy:.0%}",
    )


def panels_of(points: Sequence[Point], slas: Sequence[Sla]) -> list[Panel]:
    """Latency against throughput, effective throughput and token gaps against the load."""
    is_closed = all(isinstance(point.loop, ClosedLoop) for point in points)
    x = "clients" if is_closed else "requests/s offered"
    loads = [
        float(point.loop.clients if isinstance(point.loop, ClosedLoop) else point.loop.rate)
        for point in points
    ]
    figures = [point.figures for point in points]

    def over_load(label: str, values: Sequence[float], colour: int) -> Curve:
        return Curve(label=label, points=list(zip(loads, values, strict=True)), colour=colour)

    latency = Curve(
        label="mean latency",
        points=[(one.requests_per_s, one.mean_latency_s) for one in figures],
        notes=[f"{load:g}" for load in loads],
    )
    effective = [
        over_load(f"{sla.token_rate:g} tokens/s", [one.effective_per_s[n] for one in figures], n)
        for n, sla in enumerate(slas)
    ]
    gaps = [
        over_load(name, [one.token_gap_s[n] for one in figures], n)
        for n, name in enumerate(("P50", "P90", "P95"))
    ]
    rate = over_load("all", [one.requests_per_s for one in figures], len(slas))
    return [
        Panel(title=f"latency (numbers: {x})", x="requests/s", y="seconds", curves=[latency]),
        Panel(title="requests/s that meet an SLA", x=x, y="requests/s", curves=[*effective, rate]),
        Panel(title="token gaps", x=x, y="seconds", curves=gaps),
    ]
