"""A short run of the suite, faults coming three times as often as in a long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


LEAST = {"requests": 100, "kills": 5, "cuts": 1, "delays": 1, "zombies": 1}


@pytest.mark.timeout(120)
def test_nothing_is_lost_repeated_or_reordered(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    least = ",".join(f"{name}={number}" for name, number in LEAST.items())
    command = [sys.executable, str(HERE / "suite.py"), "--seconds", "8", "--seed", "short"]
    command += ["--intensity", "3", "--least", least, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report = json.loads(output.read_text())
    assert report["terminals"] == {"1": report["requests"]}
    for name, number in LEAST.items():
        assert report[name] >= number
