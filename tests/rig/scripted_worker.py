"""A worker with a scripted engine, as a process: `scripted_worker.py URL LEASE_MS STEP_MS`."""

import logging
import sys

from scripted_engine import ScriptedEngine
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.process import run


def main(url: str, lease_ms: str, step_ms: str) -> int:
    configure(as_json=True, level=logging.INFO)
    config = WorkerConfig(model="scripted", redis_url=url, lease_ms=int(lease_ms))
    return run(config, make_engine=lambda _: ScriptedEngine(step_s=int(step_ms) / 1000))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
