"""70B on paper: what a measured model's steps say of Llama-2-70B on 4 GPUs, beside FastGen.

`gpu_steps.py` measured what steps of Llama-3.1-8B's shapes cost on one GPU. A step of the larger
model is taken to cost as much for each weight that a GPU reads and multiplies, for each byte of
keys and values that it reads, and two sums over the GPUs in each layer. That narrower products are
as good, and that nothing but the sums is lost, is assumed, not measured. The scheduler that serves
then runs in virtual time, as in `paper_curves.py`; nothing needs a GPU here.

    python bench/gpu_plan.py --out OUTDIR

Published figures: arXiv 2401.08671 (requests/s are clients over mean latency, as counted there).
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from workloads import ROOT, provenance

from tokenmill.engine.planning.device import Device, EngineShape
from tokenmill.engine.planning.figures import Sla, figures_of
from tokenmill.engine.planning.load import ClosedLoop, Lengths
from tokenmill.engine.planning.simulation import simulate
from tokenmill.engine.planning.step_cost import StepCost

MEASURED = "llama-3.1-8b"
PUBLISHED = ROOT / "tests" / "engine" / "planning" / "published.json"
FASTGEN = "llama-2-70b-4xa100-fastgen"
#: (prompt, output, clients): FastGen's mean latency in seconds on 4 x H100, and effective
#: requests/s at 4 tokens/s with up to 48 clients.
H100_SATURATED, H100_EFFECTIVE = (2600, 60, 64, 17.6), (2600, 60, 48, 3.35)
SLA = Sla(512, 4)


@dataclass(frozen=True, slots=True)
class Shapes:
    """What of a dense model a step's cost depends on."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128

    @property
    def weights(self) -> int:
        """Elements that every token is multiplied by, the head among them."""
        attention = self.hidden * 2 * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.head

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def kv_bytes(self) -> int:
        """Of a token, in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


LLAMA_8B = Shapes(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = Shapes(80, 8192, 28672, 64, 8, 32000)


@dataclass(frozen=True, slots=True)
class Group:
    """GPUs that a model is divided among. The defaults are assumed of four on NVLink 4."""

    size: int = 4
    memory_bytes: float = 80e9
    #: Of the memory, what weights and the cache may take together.
    usable: float = 0.88
    #: A sum over the GPUs: what it takes before the first byte, and bytes/s of each link.
    sum_s: float = 12e-6
    link_bytes_per_s: float = 300e9

    def sum_seconds(self, shapes: Shapes, tokens: float) -> float:
        """Of a step: two sums in each layer, of 16 bits a hidden element."""
        moved = 2 * (self.size - 1) / self.size * tokens * shapes.hidden * 2
        return 2 * shapes.layers * (self.sum_s + moved / self.link_bytes_per_s)


def scaled(device: Device, source: Shapes, target: Shapes, group: Group) -> Device:
    """`device`, which ran `source`, as a group that runs `target`."""
    share = target.weights / source.weights / group.size
    points = tuple(
        (tokens, seconds * share + group.sum_seconds(target, tokens))
        for tokens, seconds in device.cost.points
    )
    kv_share = target.kv_bytes / source.kv_bytes / group.size
    cost = replace(device.cost, points=points, kv_token_s=device.cost.kv_token_s * kv_share)
    room = group.usable * group.size * group.memory_bytes - 2 * target.weights
    return Device(
        cost=cost,
        engine=EngineShape(
            token_budget=2048, max_num_seqs=256, kv_tokens=int(room / target.kv_bytes)
        ),
        device=f"Llama-2-70B on {group.size} GPUs, on paper",
        source=f"scaled from: {device.device}; {device.source}",
    )


def fitted(cost: StepCost) -> str:
    """The curve in words: a step of 1, of 256 and of 2,048 tokens without a cache."""
    parts = [f"{1e3 * cost.seconds([(0, tokens)]):.1f} ms" for tokens in (1, 256, 2048)]
    return f"a step of 1 token {parts[0]}, of 256 {parts[1]}, of 2,048 {parts[2]}"


def mean_latency_s(device: Device, prompt: int, output: int, clients: int) -> float:
    return _figures(device, prompt, output, clients)[0]


def _figures(device: Device, prompt: int, output: int, clients: int) -> tuple[float, float]:
    """Mean latency, and requests/s that meet the SLA."""
    lengths = Lengths(
        requests=min(512, 8 * clients + 64),
        mean_prompt=prompt,
        mean_output=output,
        max_prompt=4000,
        seed=42,
    )
    found = figures_of(simulate(device, lengths, ClosedLoop(clients)).records, [SLA])
    return found.mean_latency_s, found.effective_per_s[0]


def lines(device: Device) -> list[str]:
    """A table: ours on paper beside FastGen's published figures, on A100s and on H100s."""
    published = json.loads(PUBLISHED.read_text())
    found = [f"{device.device}: {fitted(device.cost)}", device.source]
    found.append("prompt/output, clients: requests/s at mean latency, ours on 4 x H100 on paper")
    for case, systems in published["mean_latency_s"].items():
        prompt, output = map(int, case.split("/"))
        for clients in (1, 6, 12, 32):
            theirs = systems[FASTGEN][published["clients"].index(clients)]
            ours = mean_latency_s(device, prompt, output, clients)
            found.append(
                f"{case:9} {clients:3}: {clients / ours:6.2f}/s at {ours:6.2f} s; FastGen on "
                f"4 x A100 {clients / theirs:.2f}/s at {theirs:.2f} s: {theirs / ours:.1f} times"
            )
    prompt, output, clients, theirs = H100_SATURATED
    ours = mean_latency_s(device, prompt, output, clients)
    found.append(
        f"{prompt}/{output}   {clients:3}: {clients / ours:6.2f}/s at {ours:6.2f} s; FastGen on "
        f"4 x H100 {clients / theirs:.2f}/s at {theirs:.2f} s: {theirs / ours:.1f} times"
    )
    prompt, output, clients, rate = H100_EFFECTIVE
    _, effective = _figures(device, prompt, output, clients)
    found.append(
        f"{prompt}/{output}   {clients:3}: {effective:6.2f}/s with 4 tokens/s; FastGen on 4 x H100 "
        f"{rate:.2f}/s: {effective / rate:.1f} times"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="nothing: what lies there is planned")
    parser.add_argument("--seconds", type=float, help="nothing: it takes some seconds")
    options = parser.parse_args()
    measured = options.out / f"device_{MEASURED}.json"
    if not measured.exists():
        raise SystemExit(f"expected {measured}, which the part steps writes; there is none")
    device = scaled(Device.read(str(measured)), LLAMA_8B, LLAMA_70B, Group())
    text = lines(device)
    content = {
        "bench": "gpu_plan",
        "device": device.to_mapping(),
        "lines": text,
        "provenance": provenance(),
    }
    (options.out / "gpu_plan.json").write_text(json.dumps(content, indent=2) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
