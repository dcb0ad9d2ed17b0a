"""A real worker around the real engine that writes down its steps.

    python bench/timed_worker.py URL QUEUE FILE --policy P [--token-budget N] [--max-step-ms MS]

A line of FILE is a step: when it began, its seconds, and its chunks as [start, length]. The seconds
are those until the next step where one followed at once: what the loop does between two steps is
part of the cost. The first line is the engine.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `tokenmill worker` sets it, before torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine, StepOutput
from tokenmill.engine.loader import load
from tokenmill.engine.scheduler import Chunk, Policy, SchedulerOutput
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.process import run


class TimedEngine(Engine):
    """The engine, and a file of its steps."""

    def write_to(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        pool = self.scheduler.pool
        self._say(
            token_budget=self.scheduler.token_budget,
            max_num_seqs=self.scheduler.max_num_seqs,
            kv_tokens=pool.num_blocks * pool.block_size,
            block_size=pool.block_size,
        )
        self._chunks: tuple[Chunk, ...] = ()
        self._unwritten: dict[str, Any] | None = None
        schedule = self.scheduler.schedule

        def kept() -> SchedulerOutput:
            output = schedule()
            self._chunks = output.chunks
            return output

        setattr(self.scheduler, "schedule", kept)  # noqa: B010 - a method, replaced on purpose

    def step(self) -> list[StepOutput]:
        began = time.perf_counter()
        if self._unwritten is not None:
            self._say(**self._unwritten | {"seconds": began - self._unwritten["began"]})
            self._unwritten = None
        outputs = super().step()
        chunks = [(chunk.start, chunk.length) for chunk in self._chunks]
        line = {"began": began, "seconds": time.perf_counter() - began, "chunks": chunks}
        if self.has_work:
            self._unwritten = line
        else:
            self._say(**line)
        return outputs

    def _say(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("queue")
    parser.add_argument("file", type=Path)
    parser.add_argument("--policy", type=Policy, default=Policy.SPLITFUSE)
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--max-step-ms", type=float)
    options = parser.parse_args()
    configure(as_json=True, level=logging.WARNING)
    config = WorkerConfig(
        model="smollm2",
        redis_url=options.url,
        queue=options.queue,
        device="cpu",
        engine=EngineConfig(
            policy=options.policy,
            token_budget=options.token_budget,
            max_step_ms=options.max_step_ms,
            prefix_caching=False,
        ),
    )

    def make_engine(config: WorkerConfig) -> TimedEngine:
        engine = TimedEngine(load(config.model, device=config.device), config.engine)
        engine.write_to(options.file)
        return engine

    return run(config, make_engine=make_engine)


if __name__ == "__main__":
    sys.exit(main())
