"""What is counted of a run: by hand, for runs small enough."""

import pytest

from tokenmill.engine.planning.figures import (
    Record,
    Sla,
    figures_of,
    percentiles,
    steady_gaps,
    worst_average,
)


def record(sent: float, *times: float, prompt: int = 100) -> Record:
    return Record(sent, prompt, list(times))


def test_the_moving_average_is_the_one_of_pandas() -> None:
    # pandas.Series([1, 2, 4]).ewm(span=16).mean() is [1, 1.468750, 2.459038]
    assert worst_average([1, 2]) == pytest.approx((2 + 15 / 17) / (1 + 15 / 17))
    assert worst_average([1, 2, 4]) == pytest.approx(2.459038, rel=1e-6)
    assert worst_average([4, 1, 1]) == 4
    assert worst_average([]) == 0


def test_an_sla_looks_at_the_first_token_and_at_the_gaps() -> None:
    sla = Sla(prompt_rate=100, token_rate=2)
    assert sla.is_met(record(0, 1.0, 1.4, 1.8))
    assert not sla.is_met(record(0, 1.1, 1.4, 1.8))
    assert not sla.is_met(record(0, 1.0, 1.5, 2.0))  # always under the limit, not at it
    assert sla.is_met(record(0, 2.0, 2.4, prompt=200))


def test_rates_are_of_wall_time() -> None:
    figures = figures_of([record(1, 2, 3), record(2, 4, 5, 6)], [Sla(100, 0.1), Sla(100, 1)])
    assert figures.wall_s == 5
    assert figures.requests_per_s == pytest.approx(0.4)
    assert figures.tokens_per_s == pytest.approx(205 / 5)
    assert figures.output_tokens_per_s == 1
    assert figures.mean_latency_s == 3
    assert list(figures.met) == [0.5, 0]
    assert list(figures.effective_per_s) == [pytest.approx(0.2), 0]


def test_gaps_leave_out_the_ends_of_the_run_and_of_each_request() -> None:
    records = [record(n, n + 1, n + 1.5, n + 3.5, n + 4.5, n + 9) for n in range(10)]
    assert steady_gaps(records) == [2.0, 1.0] * 8


def test_percentiles_are_interpolated() -> None:
    assert percentiles([3, 1, 2]) == pytest.approx((2, 2.8, 2.9))
    assert percentiles([]) == (0, 0, 0)
