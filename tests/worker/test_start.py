"""A start is told in parts."""

from types import SimpleNamespace
from typing import Any

import pytest

from tokenmill.engine import start
from tokenmill.engine.start_times import StartTimes
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.process import load_engine, process_age_s


def test_the_parts_of_a_start_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = StartTimes(clock=iter([1.0, 3.0, 3.5, 4.5]).__next__)
    for part in ("model", "kv_cache", "steps"):
        times.end(part)
    stats = SimpleNamespace(cost=SimpleNamespace(num_steps=0))
    engine: Any = SimpleNamespace(start_times=times, stats=lambda: stats)
    monkeypatch.setattr(start, "start_engine", lambda *_, **__: engine)
    caplog.set_level("INFO", "tokenmill.worker")
    assert load_engine(WorkerConfig(model="m", redis_url="redis://nowhere")) is engine
    (record,) = (r for r in caplog.records if r.getMessage() == "start_timed")
    fields = record.__dict__["fields"]
    assert (fields["model_s"], fields["kv_cache_s"], fields["steps_s"]) == (2.0, 0.5, 1.0)
    assert 0 <= fields["imports_s"] < fields["python_s"]


def test_the_age_of_the_process_grows() -> None:
    first = process_age_s()
    assert first is not None
    assert 0 < first < 86_400
    assert (process_age_s() or 0) >= first
