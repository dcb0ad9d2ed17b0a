"""Claim: fed with the cost of steps of Llama-2-70B on 4 x A100, the planner gives the curves that
the FastGen paper published, for its system and for vLLM of 2023, within 15%.

Nothing is timed here: the real scheduler runs in virtual time (`tokenmill plan`), some seconds.

    python bench/paper_curves.py

Writes bench/results/paper_curves.json, docs/figures/paper.svg and .png. Effective throughput and
token gaps are held by tests/engine/planning/test_paper.py.
"""

import json
from typing import Any

from workloads import ROOT, write_result

from tokenmill.engine.planning.device import Device
from tokenmill.engine.planning.figures import figures_of
from tokenmill.engine.planning.load import ClosedLoop, Lengths
from tokenmill.engine.planning.plot import Curve, Panel, draw
from tokenmill.engine.planning.simulation import simulate

PUBLISHED = ROOT / "tests" / "engine" / "planning" / "published.json"


def main() -> None:
    published = json.loads(PUBLISHED.read_text())
    panels, rows = [], []
    for case, systems in published["mean_latency_s"].items():
        curves = []
        for colour, (name, latencies) in enumerate(systems.items()):
            found = [simulated(name, case, clients) for clients in published["clients"]]
            label = "FastGen" if "fastgen" in name else "vLLM 2023"
            for said, seconds in (("published", latencies), ("simulated", found)):
                points = [(c / s, s) for c, s in zip(published["clients"], seconds, strict=True)]
                notes = [str(c) for c in published["clients"]] if said == "published" else []
                curves.append(
                    Curve(
                        label=f"{label}, {said}",
                        points=points,
                        notes=notes,
                        colour=colour,
                        is_other=said == "published",
                    )
                )
            rows.append(row_of(case, name, latencies, found))
            print(f"{case} {label}: off by up to {rows[-1]['most_off']:.1%}")
        panels.append(
            Panel(
                title=f"{case} tokens (numbers: clients)",
                x="requests/s (clients over mean latency)",
                y="mean latency, s",
                curves=curves,
            )
        )
    folder = ROOT / "docs" / "figures"
    title = "Llama-2-70B on 4 x A100-80G: the paper's curves, and the scheduler in virtual time"
    draw(title, panels, [folder / "paper.svg", folder / "paper.png"])
    print(write_result("paper_curves", None, {"source": published["source"], "curves": rows}))


def row_of(case: str, name: str, latencies: list[float], found: list[float]) -> dict[str, Any]:
    off = [ours / theirs - 1 for ours, theirs in zip(found, latencies, strict=True)]
    most = max(map(abs, off))
    return {"case": case, "device": name, "simulated_s": found, "off": off, "most_off": most}


def simulated(name: str, case: str, clients: int) -> float:
    prompt, output = map(int, case.split("/"))
    lengths = Lengths(
        requests=512, mean_prompt=prompt, mean_output=output, max_prompt=4000, seed=42
    )
    run = simulate(Device.read(name), lengths, ClosedLoop(clients))
    return figures_of(run.records, ()).mean_latency_s


if __name__ == "__main__":
    main()
