"""Loads on a device: what each gives, and how many replicas a rate needs. Standard library only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from tokenmill.engine.planning.device import Device
from tokenmill.engine.planning.figures import Figures, Sla, figures_of
from tokenmill.engine.planning.load import ClosedLoop, Lengths, OpenLoop
from tokenmill.engine.planning.simulation import simulate
from tokenmill.producer.errors import InvalidRequest

#: Replicas that are simulated together; a larger fleet needs as many in proportion, or fewer, as
#: one queue serves them all.
MAX_FLEET = 32
#: A rate is judged over so many times the latency of an idle replica.
WINDOWS = 20
#: Clients that saturate a replica.
SATURATION = 64


@dataclass(frozen=True, slots=True)
class Point:
    """One load and what came of it."""

    loop: ClosedLoop | OpenLoop
    figures: Figures
    busy: float
    num_steps: int
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Replicas for a rate, and the share of requests that then meets the SLA."""

    rate: float
    sla: Sla
    goal: float
    #: None: no number of replicas meets the goal.
    replicas: int | None
    met: float


def point(
    device: Device,
    lengths: Lengths,
    loop: ClosedLoop | OpenLoop,
    slas: Sequence[Sla],
    *,
    replicas: int = 1,
) -> Point:
    """Simulate one load."""
    run = simulate(device, lengths, loop, replicas=replicas)
    return Point(loop, figures_of(run.records, slas), run.busy, run.num_steps, run.num_preemptions)


def size(device: Device, lengths: Lengths, rate: float, sla: Sla, *, goal: float) -> Sizing:
    """The fewest replicas of which a share `goal` of Poisson arrivals meets the SLA.

    Raises:
        InvalidRequest: `goal` is no share.
    """
    if not 0 < goal <= 1:
        raise InvalidRequest("goal", "a share above 0 and up to 1", goal)
    alone = simulate(device, replace(lengths, requests=64), ClosedLoop(1)).records
    idle = fmean(sla.is_met(record) for record in alone)
    if idle < goal:
        return Sizing(rate=rate, sla=sla, goal=goal, replicas=None, met=idle)
    full = simulate(device, replace(lengths, requests=8 * SATURATION), ClosedLoop(SATURATION))
    peak = figures_of(full.records, ()).requests_per_s
    scale = max(rate / peak / MAX_FLEET, 1.0)
    latency_s = fmean(record.latency_s for record in alone)
    requests = max(lengths.requests, math.ceil(rate / scale * latency_s * WINDOWS))
    load = replace(lengths, requests=requests)

    def met(replicas: int) -> float:
        run = simulate(device, load, OpenLoop(rate / scale), replicas=replicas)
        return fmean(sla.is_met(record) for record in run.records)

    low = max(math.ceil(rate / scale / peak), 1) - 1  # so few cannot even keep up
    high = low + 1
    while (share := met(high)) < goal:
        low, high = high, 2 * high
        if high > 64 * MAX_FLEET:
            return Sizing(rate=rate, sla=sla, goal=goal, replicas=None, met=share)
    while high - low > 1:
        middle = (low + high) // 2
        tried = met(middle)
        low, high, share = (low, middle, tried) if tried >= goal else (middle, high, share)
    return Sizing(rate=rate, sla=sla, goal=goal, replicas=math.ceil(high * scale), met=share)
