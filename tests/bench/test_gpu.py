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
    assert run(tmp_path, "kernel").returncode == 2


def test_one_part_runs_alone_and_the_table_says_what_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, "sync:50", "--tiny")
    assert done.returncode == 0, done.stdout
    assert "== sync, up to 50 s" in done.stdout
    table = (tmp_path / "table.txt").read_text()
    assert "operations in launches" in table
    assert "engine: no result" in table
    assert "a rehearsal" in table


def test_a_part_that_there_is_no_time_for_is_left_out(tmp_path: Path) -> None:
    done = run(tmp_path, "kernels", "--tiny", "--limit", "14")
    assert done.returncode == 1
    assert "== kernels: left out, 14 s are left" in done.stdout


@pytest.mark.slow
def test_the_rehearsal_runs_through(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny")
    assert done.returncode == 0, done.stdout
    table = (tmp_path / "table.txt").read_text()
    for part in ("decode attention", "chunk attention", "sampling", "experts", "nano", "start"):
        assert part in table
    assert "tokenmill over it" in table
    assert "Llama-2-70B on 4 GPUs" in table
    assert "no result" not in table
    assert "failed" not in table
