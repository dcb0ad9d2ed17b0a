"""`tokenmill plan`: how much a device serves, and how many replicas a rate needs.

It runs the real scheduler in virtual time (`engine/planning`); without `--model` it loads no torch.
"""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.planning.device import Device, EngineShape, known_devices
from tokenmill.engine.planning.figures import Sla
from tokenmill.engine.planning.load import ClosedLoop, Lengths, OpenLoop
from tokenmill.engine.planning.plot import draw
from tokenmill.engine.planning.report import panels_of, row_of, table_of
from tokenmill.engine.planning.sizing import Point, point, size
from tokenmill.engine.planning.step_cost import StepCost
from tokenmill.engine.scheduler import Policy
from tokenmill.producer.errors import InvalidRequest
from tokenmill.worker.cli import SPIN_COUNT

#: The engine of a device of which only the cost of a step is known.
GIVEN = EngineShape(token_budget=768, max_num_seqs=256, kv_tokens=400_000)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers with commas between, got {text!r}") from error


def _points(text: str) -> tuple[tuple[float, float], ...]:
    pairs = [part.split(":") for part in text.split(",")]
    try:
        return tuple((float(tokens), float(seconds)) for tokens, seconds in pairs)
    except ValueError as error:
        raise click.BadParameter(f"expected tokens:seconds,tokens:seconds, got {text!r}") from error


@click.command()
@click.option("--device", metavar="NAME|FILE", help=f"JSON, or {', '.join(known_devices())}.")
@click.option("--model", metavar="MODEL", help="Measure this machine with this model.")
@click.option(
    "--quantization",
    type=click.Choice(["none", "int8"]),
    default="none",
    help="Of --model; a worker's.",
)
@click.option("--cost", type=_numbers, metavar="A,B,C", help="Seconds: A + B*tokens + C*KV tokens.")
@click.option("--points", type=_points, metavar="T:S,...", help="Seconds S of a step of T tokens.")
@click.option("--save-device", type=click.Path(path_type=Path), help="Write the device as JSON.")
@click.option("--prompt-tokens", default=1200, show_default=True, help="Mean length of prompts.")
@click.option("--output-tokens", default=128, show_default=True, help="Mean length of outputs.")
@click.option("--max-prompt-tokens", default=1_000_000, metavar="N", help="Longest prompt.")
@click.option("--requests", default=512, show_default=True, help="Requests of each load.")
@click.option("--clients", type=_numbers, metavar="N,...", help="Closed loops. [1,2,4,8,16,32]")
@click.option("--rate", type=_numbers, metavar="R,...", help="Open loops: requests/s (Poisson).")
@click.option("--replicas", default=1, show_default=True, help="Workers that share the load.")
@click.option("--replicas-for", type=float, metavar="R", help="Find the replicas for R requests/s.")
@click.option("--goal", default=0.95, show_default=True, help="Share that is to meet the SLA.")
@click.option("--sla", type=_numbers, default="2,4,6", show_default=True, help="Tokens/s.")
@click.option("--first-token-rate", default=512.0, show_default=True, help="Prompt tokens/s.")
@click.option(
    "--policy", type=click.Choice([policy.value for policy in Policy]), help="A worker's."
)
@click.option("--token-budget", type=int, help="Most tokens in a step.")
@click.option("--max-num-seqs", type=int, help="Most sequences at once.")
@click.option("--kv-tokens", type=int, help="Tokens that the KV cache holds.")
@click.option("--max-step-ms", type=float, help="A worker's.")
@click.option("--seed", default=0, help="Of lengths and arrivals.")
@click.option("--plot", type=click.Path(path_type=Path), multiple=True, help="Write .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(**options: Any) -> None:
    """Predict throughput, latency and the replicas for an SLA.

    The real scheduler runs in virtual time over the cost of a step, which is measured here
    (--model), known of a device (--device), or given (--cost, --points).
    """
    lengths = Lengths(
        requests=options["requests"],
        mean_prompt=options["prompt_tokens"],
        mean_output=options["output_tokens"],
        max_prompt=options["max_prompt_tokens"],
        seed=options["seed"],
    )
    slas = [Sla(options["first_token_rate"], rate) for rate in options["sla"]]
    device = _shaped(_device(options, lengths), options)
    if options["save_device"]:
        text = json.dumps(device.to_mapping(), indent=2)
        options["save_device"].write_text(text + "\n", encoding="utf-8")
    points = [
        point(device, lengths, loop, slas, replicas=_positive("replicas", options["replicas"]))
        for loop in _loops(options)
    ]
    sizings = [
        size(device, lengths, options["replicas_for"], sla, goal=options["goal"])
        for sla in slas
        if options["replicas_for"] is not None
    ]
    if options["plot"]:
        draw(_title(device, lengths), panels_of(points, slas), options["plot"])
    if options["as_json"]:
        rows = [row_of(entry, slas) for entry in points]
        content = {
            "device": device.to_mapping(),
            "lengths": asdict(lengths),
            "replicas": options["replicas"],
            "loads": rows,
            "replicas_for": [asdict(sizing) for sizing in sizings],
        }
        click.echo(json.dumps(content, indent=2))
        return
    _show(device, points, slas, _title(device, lengths))
    for sizing in sizings:
        found = (
            "no number of replicas" if sizing.replicas is None else f"{sizing.replicas} replicas"
        )
        click.echo(
            f"{sizing.rate:g} requests/s, {sizing.goal:.0%} with a first token within prompt/"
            f"{sizing.sla.prompt_rate:g} s and {sizing.sla.token_rate:g} tokens/s: {found} "
            f"({sizing.met:.1%} met)"
        )


def _show(device: Device, points: list[Point], slas: list[Sla], title: str) -> None:
    click.echo(title)
    if device.source:
        click.echo(device.source)
    click.echo("")
    click.echo(table_of(points, slas))


def _title(device: Device, lengths: Lengths) -> str:
    engine = device.engine
    return (
        f"{device.device or 'given cost'}: {lengths.mean_prompt} prompt and "
        f"{lengths.mean_output} output tokens, {engine.policy.value}, budget {engine.token_budget}"
    )


def _device(options: dict[str, Any], lengths: Lengths) -> Device:
    given = [name for name in ("device", "model", "cost", "points") if options[name]]
    if len(given) != 1:
        raise InvalidRequest(
            "device",
            "one of --device, --model, --cost and --points",
            " and ".join(given) or "none",
            f"known devices: {', '.join(known_devices())}",
        )
    if options["device"]:
        return Device.read(options["device"])
    if options["model"]:
        return _measured(options, lengths)
    if options["points"]:
        return Device(cost=StepCost(points=options["points"]), engine=GIVEN)
    if not 2 <= len(options["cost"]) <= 3:
        raise InvalidRequest("cost", "two or three numbers of seconds", options["cost"])
    return Device(cost=StepCost.linear(*options["cost"]), engine=GIVEN)


def _measured(options: dict[str, Any], lengths: Lengths) -> Device:
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # as the worker that is planned for
    from tokenmill.engine.engine import Engine
    from tokenmill.engine.loader import load
    from tokenmill.engine.planning.measuring import SECONDS, measured

    click.echo(f"running steps of {options['model']} for {SECONDS:g} s ...", err=True)
    policy = Policy(options["policy"] or Policy.SPLITFUSE)
    config = EngineConfig(
        token_budget=options["token_budget"],
        max_num_seqs=options["max_num_seqs"],
        max_step_ms=options["max_step_ms"],
        policy=policy,
        prefix_caching=False,
    )
    model = load(options["model"], device="auto", quantization=options["quantization"])
    engine = Engine(model, config)
    return measured(engine, lengths, policy=policy)


def _shaped(device: Device, options: dict[str, Any]) -> Device:
    """The device, with what the command line says of its engine."""
    changes: dict[str, Any] = {
        name: options[name]
        for name in ("token_budget", "max_num_seqs", "kv_tokens")
        if options[name] is not None
    }
    if "token_budget" in changes and "max_num_seqs" not in changes:
        changes["max_num_seqs"] = min(device.engine.max_num_seqs, changes["token_budget"])
    if options["policy"]:
        changes["policy"] = Policy(options["policy"])
    if options["max_step_ms"] is not None:
        changes["max_step_s"] = options["max_step_ms"] / 1000
    return replace(device, engine=replace(device.engine, **changes))


def _loops(options: dict[str, Any]) -> list[ClosedLoop | OpenLoop]:
    open_loops = [OpenLoop(rate) for rate in options["rate"] or ()]
    clients = options["clients"] or (() if open_loops else (1, 2, 4, 8, 16, 32))
    return [*(ClosedLoop(int(number)) for number in clients), *open_loops]


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise InvalidRequest(name, "at least 1", value)
    return value
