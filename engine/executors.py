"""`make_executor`: the executor that a configuration asks for."""

import os
from collections.abc import Mapping

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.device_executor import DeviceExecutor
from tokenmill.engine.executor import Executor, HostExecutor
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.low_rank import Adapter
from tokenmill.engine.models.mlp import MoE
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
    asked = [name for name in ("async_scheduling", "cuda_graphs") if getattr(config, name)]
    if not asked:
        return HostExecutor(runner, model.tokenizer, adapters)
    if runner.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InvalidRequest(asked[0], "left out on a CPU", True)
    mlps = [layer.mlp for layer in model.weights.layers]
    if config.cuda_graphs and any(isinstance(mlp, MoE) and mlp.stacks is None for mlp in mlps):
        expected = "left out where experts are computed one by one"
        raise InvalidRequest("cuda_graphs", expected, True)
    return DeviceExecutor(
        runner,
        model.tokenizer,
        adapters,
        max_num_seqs=max_num_seqs,
        is_captured=config.cuda_graphs,
    )
