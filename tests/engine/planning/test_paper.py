"""The planner against the figures of the FastGen paper: Llama-2-70B on 4 x A100-80G.

Fitted to them: what a step of one, of about 16 and of 768 tokens takes (one client's latency, P50
and P95 of the token gaps, saturation). Everything else is what the scheduler makes of it. vLLM of
2023 is `prefill_first`: whole prompts, several in one step of up to 4,096 tokens, before decodes.
"""

import json
from functools import cache
from pathlib import Path

import pytest

from tokenmill.engine.planning.device import Device
from tokenmill.engine.planning.figures import Figures, Sla, figures_of
from tokenmill.engine.planning.load import ClosedLoop, Lengths
from tokenmill.engine.planning.simulation import simulate

FASTGEN, VLLM = "llama-2-70b-4xa100-fastgen", "llama-2-70b-4xa100-vllm-2023"
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
CLIENTS = PUBLISHED["clients"]
#: Mean latency in seconds at these clients; the paper's throughput is clients over it.
LATENCIES = {
    (name, *map(int, case.split("/"))): values
    for case, systems in PUBLISHED["mean_latency_s"].items()
    for name, values in systems.items()
}
SLAS = [Sla(512, rate) for rate in (2, 4, 6)]
WITHIN = 0.15


@cache
def simulated(name: str, prompt: int, output: int, clients: int, requests: int = 0) -> Figures:
    lengths = Lengths(
        requests=requests or min(512, 8 * clients + 64),
        mean_prompt=prompt,
        mean_output=output,
        max_prompt=4000,
        seed=42,
    )
    return figures_of(simulate(Device.read(name), lengths, ClosedLoop(clients)).records, SLAS)


@pytest.mark.parametrize(("name", "prompt", "output"), LATENCIES)
@pytest.mark.parametrize("clients", [1, 6, 12, 32])
def test_latency_at_a_number_of_clients(name: str, prompt: int, output: int, clients: int) -> None:
    published = LATENCIES[name, prompt, output][CLIENTS.index(clients)]
    found = simulated(name, prompt, output, clients).mean_latency_s
    assert found == pytest.approx(published, rel=WITHIN)


def test_twice_the_throughput_at_9_seconds() -> None:
    """As the paper counts it: 12 clients beside 6, clients over mean latency."""
    ours, theirs = simulated(FASTGEN, 1200, 128, 12), simulated(VLLM, 1200, 128, 6)
    assert 12 / ours.mean_latency_s == pytest.approx(1.36, rel=WITHIN)
    assert 6 / theirs.mean_latency_s == pytest.approx(0.67, rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "clients", "sla", "published"),
    [
        (FASTGEN, 16, 0, 1.42),
        (FASTGEN, 16, 1, 1.42),
        (FASTGEN, 6, 2, 0.77),
        (VLLM, 12, 0, 0.89),
        (VLLM, 6, 1, 0.63),
        (VLLM, 2, 2, 0.40),
    ],
)
def test_effective_throughput(name: str, clients: int, sla: int, published: float) -> None:
    found = simulated(name, 2600, 60, clients, 512).effective_per_s[sla]
    assert found == pytest.approx(published, rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "published"), [(FASTGEN, (0.072, 0.185, 0.188)), (VLLM, (0.077, 0.385, 0.695))]
)
def test_token_gaps_of_16_clients(name: str, published: tuple[float, ...]) -> None:
    assert simulated(name, 2600, 128, 16).token_gap_s == pytest.approx(published, rel=WITHIN)


def test_the_paper_s_ratios() -> None:
    ours, theirs = simulated(FASTGEN, 2600, 60, 16, 512), simulated(VLLM, 2600, 60, 6, 512)
    assert ours.effective_per_s[1] / theirs.effective_per_s[1] == pytest.approx(2.3, rel=WITHIN)
    ours, theirs = simulated(FASTGEN, 2600, 128, 16), simulated(VLLM, 2600, 128, 16)
    assert theirs.token_gap_s[2] / ours.token_gap_s[2] == pytest.approx(3.7, rel=WITHIN)
