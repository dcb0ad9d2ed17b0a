"""A worker whose outputs end after two tokens at most, as a process: `brief_worker.py URL`."""

import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.process import run

SCRIPT = Path(__file__).parent.parent / "integration" / "scripted_worker.py"
ScriptedEngine: Any = runpy.run_path(str(SCRIPT))["ScriptedEngine"]


class BriefEngine(ScriptedEngine):  # type: ignore[misc]
    """Whatever a request asks for."""

    def add(self, seq_id: str, prompt_ids: Sequence[int], params: Any, **rest: Any) -> None:
        super().add(seq_id, prompt_ids, params, **rest)
        prompt, output, most = self.sequences[seq_id]
        self.sequences[seq_id] = prompt, output, min(most, 2)


def main(url: str) -> int:
    configure(as_json=True, level=logging.WARNING)
    config = WorkerConfig(model="scripted", redis_url=url, lease_ms=2000)
    return run(config, make_engine=lambda _: BriefEngine(max_num_seqs=256))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
