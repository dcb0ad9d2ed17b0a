"""Virtual time: loads whose outcome can be computed by hand."""

from dataclasses import replace

import pytest

from tokenmill.engine.planning.device import Device, EngineShape
from tokenmill.engine.planning.figures import Sla
from tokenmill.engine.planning.load import ClosedLoop, Lengths, OpenLoop
from tokenmill.engine.planning.simulation import Run, simulate
from tokenmill.engine.planning.sizing import size
from tokenmill.engine.planning.step_cost import StepCost
from tokenmill.engine.scheduler import Policy
from tokenmill.producer.errors import InvalidRequest

#: A step takes 10 ms and 1 ms for each token.
DEVICE = Device(
    cost=StepCost.linear(0.010, 0.001),
    engine=EngineShape(token_budget=100, max_num_seqs=32, kv_tokens=10_000, block_size=10),
)
LENGTHS = Lengths(requests=40, mean_prompt=150, mean_output=20)


def run(policy: Policy = Policy.SPLITFUSE, clients: int = 8, replicas: int = 1) -> Run:
    device = replace(DEVICE, engine=replace(DEVICE.engine, policy=policy))
    return simulate(device, LENGTHS, ClosedLoop(clients), replicas=replicas)


def test_one_client_waits_for_its_own_steps_alone() -> None:
    lengths = LENGTHS.draw()
    for record, (prompt, output) in zip(run(clients=1).records, lengths, strict=True):
        steps = -(-prompt // 100) + output - 1
        assert record.latency_s == pytest.approx(steps * 0.010 + (prompt + output - 1) * 0.001)
        assert len(record.token_times) == output


@pytest.mark.parametrize("policy", Policy)
def test_every_request_ends_with_all_its_tokens(policy: Policy) -> None:
    records = run(policy).records
    assert sorted((r.num_prompt_tokens, len(r.token_times)) for r in records) == sorted(
        LENGTHS.draw()
    )


def test_a_closed_loop_never_has_more_requests_than_clients() -> None:
    records = run(clients=3).records
    for record in records:
        others = sum(r.sent_s <= record.sent_s < r.token_times[-1] for r in records)
        assert others <= 3


def test_the_worst_gap_of_splitfuse_is_a_full_step_and_of_prefill_first_is_more() -> None:
    full = 0.010 + 0.001 * 100
    assert max(max(r.gaps()) for r in run().records) <= full + 1e-9
    assert max(max(r.gaps()) for r in run(Policy.PREFILL_FIRST).records) > 1.5 * full


def test_replicas_share_one_queue() -> None:
    one, two = run(clients=16), run(clients=16, replicas=2)
    ends = [max(r.token_times[-1] for r in found.records) for found in (one, two)]
    assert ends[0] / ends[1] == pytest.approx(2, rel=0.25)
    assert 0.8 < two.busy <= 1


def test_the_same_seed_is_the_same_run() -> None:
    loop = OpenLoop(5.0)
    first, second = (simulate(DEVICE, LENGTHS, loop).records for _ in range(2))
    assert [r.token_times for r in first] == [r.token_times for r in second]


def test_a_small_cache_preempts_and_still_ends() -> None:
    device = replace(DEVICE, engine=replace(DEVICE.engine, kv_tokens=500))
    found = simulate(device, LENGTHS, ClosedLoop(8))
    assert sum(len(r.token_times) for r in found.records) == sum(o for _, o in LENGTHS.draw())


def test_a_request_larger_than_the_cache_is_refused() -> None:
    device = replace(DEVICE, engine=replace(DEVICE.engine, kv_tokens=200))
    with pytest.raises(InvalidRequest, match=r"kv_tokens must be at least \d+, the longest"):
        simulate(device, LENGTHS, ClosedLoop(8))


def test_more_requests_per_second_need_more_replicas() -> None:
    sla = Sla(prompt_rate=100, token_rate=5)
    few, many = (size(DEVICE, LENGTHS, rate, sla, goal=0.9) for rate in (2.0, 30.0))
    assert few.replicas is not None
    assert many.replicas is not None
    assert few.replicas < many.replicas <= 30
    assert many.met >= 0.9


def test_an_sla_below_the_cost_of_a_step_needs_replicas_that_do_not_exist() -> None:
    found = size(DEVICE, LENGTHS, 1.0, Sla(prompt_rate=100, token_rate=200), goal=0.9)
    assert (found.replicas, found.met) == (None, 0)
