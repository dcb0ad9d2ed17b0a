"""A short run of the suite, faults coming three times as often as in a long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "seconds"), [("valkey", 10)])
def test_nothing_is_lost_repeated_or_reordered(tmp_path: Path, kind: str, seconds: int) -> None:
    output = tmp_path / "report.json"
    command = [sys.executable, str(HERE / "suite.py"), "--seconds", str(seconds), "--seed", "short"]
    command += ["--server", kind, "--intensity", "3", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report = json.loads(output.read_text())
    assert report["terminals"] == {"1": report["requests"]}
    assert report["requests"] > 100
    # It was no walk in the park.
    assert min(report[kind] for kind in ("kills", "cuts", "resumes", "delays")) > 0
