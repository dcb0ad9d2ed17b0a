"""The bench of linears of fixed sums, interpreted: what it adds up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.slow
def test_a_step_is_all_its_linears(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "gpu_fixed_linears.py", "--out", tmp_path, "--tiny"],
        cwd=BENCH,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu_fixed_linears.json").read_text())
    assert [(step["model"], step["rows"]) for step in found["steps"]] == [("tiny", 1), ("tiny", 70)]
    linears = [record for record in found["linears"] if record["rows"] == 70]
    assert [record["shape"] for record in linears] == [
        "70 x 32 -> 48",
        "70 x 64 -> 32",
        "70 x 32 -> 97",
    ]
    assert found["steps"][1]["fixed_ms"] == pytest.approx(
        2 * linears[0]["fixed_ms"] + 2 * linears[1]["fixed_ms"] + linears[2]["fixed_ms"]
    )
    assert done.stdout.startswith("tiny, 1 rows: linears ")
