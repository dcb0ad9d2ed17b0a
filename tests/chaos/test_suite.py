"""A short run of the suite, faults coming three times as often as in a long one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from servers import NO_REDIS, REDIS_SERVER

HERE = Path(__file__).parent


LEAST = {"requests": 100, "kills": 5, "cuts": 1, "delays": 1, "zombies": 1}


@pytest.mark.timeout(120)
def test_nothing_is_lost_repeated_or_reordered(tmp_path: Path) -> None:
    report = run(tmp_path, "--seconds", "8", "--seed", "short", "--intensity", "3", least=LEAST)
    assert report["terminals"] == {"1": report["requests"]}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_server_that_loses_its_last_moments_repeats_nothing_silently(tmp_path: Path) -> None:
    least = {"requests": 100, "restarts": 8}
    report = run(tmp_path, "--seconds", "20", "--intensity", "4", "--lossy", least=least)
    assert report["told"] + report["outlived"] + report["resubmitted"] > 0, "nothing was lost"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(REDIS_SERVER is None, reason=NO_REDIS)
@pytest.mark.parametrize(("kind", "servers"), [("redis", "sentinel"), ("valkey", "cluster")])
def test_primaries_that_die_lose_nobody(tmp_path: Path, kind: str, servers: str) -> None:
    options = ["--seconds", "30", "--intensity", "3", "--server", kind, "--servers", servers]
    run(tmp_path, *options, least={"requests": 100, "restarts": 2, "cuts": 3})


def run(tmp_path: Path, *options: str, least: dict[str, int]) -> dict[str, Any]:
    """The suite's report, in which nothing is wrong and so much happened."""
    output = tmp_path / "report.json"
    at_least = ",".join(f"{name}={number}" for name, number in least.items())
    command = [sys.executable, str(HERE / "suite.py"), *options]
    command += ["--least", at_least, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(output.read_text())
    for name, number in least.items():
        assert report[name] >= number
    return report
