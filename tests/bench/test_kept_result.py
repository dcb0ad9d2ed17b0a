"""What `--resume` of a bench keeps, and what it refuses to put beside new figures."""

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    monkeypatch.syspath_prepend(str(BENCH))
    import kept_result
    import workloads

    monkeypatch.setattr(workloads, "RESULTS", tmp_path)
    monkeypatch.setattr(kept_result, "RESULTS", tmp_path)

    def write_and_keep(
        *, requests: int = 8, code: str = "abc1234", **origin: object
    ) -> dict[str, Any]:
        monkeypatch.setattr(workloads, "commit", lambda: code)
        path = workloads.write_result("some", workloads.Workload("w", 8, 2, 3), {"points": [1]})
        content = json.loads(path.read_text())
        content["provenance"] |= origin
        path.write_text(json.dumps(content))
        found: dict[str, Any] = kept_result.kept_result(
            "some", workloads.Workload("w", requests, 2, 3)
        )
        return found

    assert kept_result.kept_result("some") == {}
    return write_and_keep


def test_a_result_of_the_same_code_machine_and_day_is_kept(
    kept: Callable[..., dict[str, Any]],
) -> None:
    assert kept()["points"] == [1]


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "another, 64 cores"},
        {"versions": {}},
        {"commit": "def5678"},
        {"code": "abc1234-dirty"},
        {"requests": 9},
        {"date": (dt.datetime.now(dt.UTC) - dt.timedelta(days=2)).date().isoformat()},
    ],
)
def test_others_are_refused(kept: Callable[..., dict[str, Any]], other: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match=r"would mix figures: .*some\.json is of"):
        kept(**other)
