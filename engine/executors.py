"""`make_executor`: the executor that a configuration asks for."""

import os
from collections.abc import Mapping

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.device_executor import DeviceExecutor
from tokenmill.engine.executor import Executor, HostExecutor
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.linear import Adapter
from tokenmill.engine.runner import Runner
from tokenmill.producer.errors import InvalidRequest


def make_executor(
    runner: Runner,
    config: EngineConfig,
    model: LoadedModel,
    adapters: Mapping[str, Adapter],
    max_num_seqs: int,
) -> Executor:
    """The executor for `runner`: steps laid out on the host, unless more is asked for.

    Raises:
        InvalidRequest: what is asked for needs a GPU.
    """
    if not config.async_scheduling:
        return HostExecutor(runner, model.tokenizer, adapters)
    if runner.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InvalidRequest("async_scheduling", "left out on a CPU", True)
    return DeviceExecutor(runner, model.tokenizer, adapters, max_num_seqs=max_num_seqs)
