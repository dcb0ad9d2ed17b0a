"""A worker with the real model, which its zygote has loaded."""

import logging
import os

from roles import adapt
from tokenmill.engine.config import EngineConfig
from tokenmill.worker import process
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.loop import EngineLike

_loaded: list[object] = []


def load_model() -> int:
    """Once, in the zygote. On one thread: a child could not use the threads of its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from tokenmill.engine.loader import load
    from tokenmill.engine.sources import pull

    torch.set_num_threads(1)
    pull("smollm2")
    _loaded.append(load("smollm2", device="cpu"))
    return 0


def worker(url: str, queue: str, lease_ms: int) -> int:
    configure(as_json=True, level=logging.DEBUG)
    adapt()
    config = WorkerConfig(
        model="smollm2",
        redis_url=url,
        queue=queue,
        lease_ms=lease_ms,
        engine=EngineConfig(token_budget=64),
    )

    def make_engine(_: WorkerConfig) -> EngineLike:
        from tokenmill.engine.engine import Engine
        from tokenmill.engine.loader import LoadedModel

        [model] = _loaded
        assert isinstance(model, LoadedModel)
        return Engine(model, config.engine)

    return process.run(config, make_engine=make_engine)
