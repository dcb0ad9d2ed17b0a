"""bench/gpu.sh without a GPU: what it says, and a rehearsal of everything that it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_and_wrong_options(tmp_path: Path) -> None:
    assert run("--help").stdout.startswith("usage: bench/gpu.sh OUTDIR")
    assert run("--help").returncode == 0
    assert run().returncode != 0
    assert run(tmp_path, "--fast").returncode == 2


@pytest.mark.slow
def test_the_rehearsal_runs_through(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny")
    assert done.returncode == 0, done.stdout
    table = (tmp_path / "table.txt").read_text()
    for part in ("decode attention", "chunk attention", "sampling", "experts", "nano", "ratio"):
        assert part in table
    assert "no result" not in table
