"""Costs and devices: curves, and what is refused."""

import json
from pathlib import Path

import pytest

from tokenmill.engine.cost_model import CostFit
from tokenmill.engine.planning.device import Device, EngineShape, known_devices
from tokenmill.engine.planning.step_cost import StepCost
from tokenmill.producer.errors import InvalidRequest


def test_a_curve_joins_its_points_and_goes_on_with_the_last_slope() -> None:
    cost = StepCost(points=((1, 1.0), (10, 1.0), (20, 2.0)))
    assert [cost.seconds([(0, n)]) for n in (1, 5, 10, 15, 20, 40)] == pytest.approx(
        [1, 1, 1, 1.5, 2, 4]
    )
    assert StepCost(points=((5, 1.0), (10, 2.0))).seconds([(0, 1)]) == 1


def test_a_linear_cost_is_the_engine_s_model() -> None:
    cost = StepCost.of_fit(CostFit(0.5, 0.1, 0.01))
    # 3 + 1 tokens; 20 keys are read by one group of queries, 7 by another.
    assert cost.seconds([(17, 3), (6, 1)]) == pytest.approx(0.5 + 0.4 + 0.27)
    # 17 queries are two groups.
    assert cost.seconds([(0, 17)]) == pytest.approx(0.5 + 1.7 + 0.34)


def test_the_scheduler_is_told_what_an_engine_would_have_fitted() -> None:
    fit = StepCost.linear(0.01, 0.001, 0.00001).cost_model(512).fit
    assert (fit.fixed_s, fit.token_s, fit.kv_token_s) == pytest.approx((0.01, 0.001, 0.00001))


@pytest.mark.parametrize(
    ("points", "what"),
    [
        (((1, 1.0),), "at least two"),
        (((2, 1.0), (1, 2.0)), "rising tokens"),
        (((1, 2.0), (2, 1.0)), "rising tokens"),
        (((1, 0.0), (2, 0.0)), "rising tokens"),
        (((1, 1.0), (2, float("nan"))), "rising tokens"),
    ],
)
def test_points_that_are_no_curve_are_refused(
    points: tuple[tuple[float, float], ...], what: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"points must be .*{what}"):
        StepCost(points=points)


@pytest.mark.parametrize("name", known_devices())
def test_known_devices_are_read_and_written(name: str) -> None:
    device = Device.read(name)
    assert Device.from_mapping(json.loads(json.dumps(device.to_mapping()))) == device
    assert device.device
    assert device.source


def test_a_device_that_is_none_is_refused_with_the_names_of_those_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"llama-2-70b-4xa100-fastgen.*got 'nothing'"):
        Device.read("nothing")
    path = tmp_path / "device.json"
    path.write_text('{"cost": {"points": [[1, 1], [2, 2]], "speed": 3}, "engine": {}}')
    with pytest.raises(InvalidRequest, match=r"cost must be an object like .*unexpected"):
        Device.read(str(path))


def test_an_engine_with_more_rows_than_budget_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"token_budget must be at least max_num_seqs \(8\)"):
        EngineShape(token_budget=4, max_num_seqs=8, kv_tokens=100)
