"""How the results of GPU benches are read. Standard library only."""

import json
from pathlib import Path
from typing import Any


def read_gpu_result(out: Path, bench: str) -> dict[str, Any]:
    """What lies there; empty where nothing does."""
    path = out / f"{bench}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
