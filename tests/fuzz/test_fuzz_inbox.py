"""A short run; `make fuzz` is the long one."""

from pathlib import Path
from typing import Any

from fuzz_inbox import fuzz


def test_no_malformed_request_harms_a_worker(own_server: Any, tmp_path: Path) -> None:
    report = fuzz(own_server.url, count=250, seed="short", log=tmp_path / "log", is_thorough=False)
    assert report["ended"].total() == 250
    assert min(report["ended"]["as an error"], report["ended"]["as a request"]) > 30
