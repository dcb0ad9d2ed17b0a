"""A worker whose outputs end after two tokens at most, as a process: `brief_worker.py URL`."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from scripted_engine import ScriptedEngine
from tokenmill.producer.params import SamplingParams
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.process import run


class BriefEngine(ScriptedEngine):
    """Whatever a request asks for."""

    def add(
        self, seq_id: str, prompt_ids: Sequence[int], params: SamplingParams, **rest: Any
    ) -> None:
        super().add(seq_id, prompt_ids, params, **rest)
        self.sequences[seq_id].most = min(params.max_tokens, 2)


def main(url: str) -> int:
    configure(as_json=True, level=logging.WARNING)
    config = WorkerConfig(model="scripted", redis_url=url, lease_ms=2000)
    return run(config, make_engine=lambda _: BriefEngine(max_num_seqs=256))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
