"""CostModel: the coefficients come back, outliers do not move them, the knee is where it is."""

import random

import pytest

from tokenmill.engine.cost_model import REFIT_EVERY, CostModel, Timing, kv_tokens_read

FIXED, TOKEN, KV = 0.012, 0.0016, 3e-6


def steps(count: int, *, noise: float = 0.0, disturbed: float = 0.0) -> list[Timing]:
    """Steps of a known cost; some take up to five times as long."""
    draw = random.Random(1)
    found = []
    for _ in range(count):
        tokens, kv_tokens = draw.randint(1, 512), draw.randint(0, 30_000)
        seconds = (FIXED + TOKEN * tokens + KV * kv_tokens) * (1 + draw.gauss(0, noise))
        if draw.random() < disturbed:
            seconds *= draw.uniform(1.5, 5)
        found.append(Timing(tokens, kv_tokens, seconds))
    return found


def test_the_coefficients_come_back() -> None:
    model = CostModel()
    model.probe(steps(12))
    assert model.fit.fixed_s == pytest.approx(FIXED, rel=0.01)
    assert model.fit.token_s == pytest.approx(TOKEN, rel=0.01)
    assert model.fit.kv_token_s == pytest.approx(KV, rel=0.01)
    assert model.fit.relative_error < 0.001
    assert model.fit.num_steps == 12


def test_disturbed_steps_do_not_move_the_fit() -> None:
    """A quarter of the steps take far longer, as beside another process."""
    model = CostModel()
    model.probe(steps(200, noise=0.02, disturbed=0.25))
    assert model.fit.token_s == pytest.approx(TOKEN, rel=0.05)
    assert model.fit.kv_token_s == pytest.approx(KV, rel=0.15)
    assert model.fit.relative_error < 0.05


def test_the_fit_follows_a_device_that_becomes_slower() -> None:
    model = CostModel()
    for timing in steps(2000):
        model.observe(timing)
    for timing in steps(2000):
        model.observe(Timing(timing.tokens, timing.kv_tokens, 2 * timing.seconds))
    assert model.fit.token_s == pytest.approx(2 * TOKEN, rel=0.02)


def test_no_coefficient_is_negative_and_equal_steps_are_no_error() -> None:
    model = CostModel()
    model.probe([Timing(64, 0, 0.1)] * 5)
    fit = model.fit
    assert min(fit.fixed_s, fit.token_s, fit.kv_token_s) >= 0
    assert fit.fixed_s + 64 * fit.token_s == pytest.approx(0.1)
    model.probe([Timing(100, 9000, 0.1), Timing(200, 3000, 0.1), Timing(300, 100, 0.1)])
    assert min(model.fit.fixed_s, model.fit.token_s, model.fit.kv_token_s) >= 0


def test_it_is_fitted_while_running() -> None:
    model = CostModel()
    timings = steps(REFIT_EVERY)
    for timing in timings[:-1]:
        model.observe(timing)
    assert model.fit.num_steps == 0
    assert model.seconds_of(0, 100) == 0
    model.observe(timings[-1])
    assert model.fit.num_steps == REFIT_EVERY


def test_the_knee() -> None:
    """At the knee of 90%, nine tenths of a step are not its fixed cost."""
    model = CostModel()
    assert model.knee(0.9) == 0
    model.probe(steps(12))
    tokens = model.knee(0.9)
    assert tokens * TOKEN / (FIXED + tokens * TOKEN) == pytest.approx(0.9, rel=0.01)


def test_queries_share_a_reading_of_the_keys() -> None:
    assert kv_tokens_read(99, 1) == 100
    assert kv_tokens_read(84, 16) == 100
    assert kv_tokens_read(83, 17) == 200
