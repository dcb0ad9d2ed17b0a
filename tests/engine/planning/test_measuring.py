"""A device measured: what an engine's steps say of the machine that runs this test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import load
from tokenmill.engine.planning.load import ClosedLoop, Lengths
from tokenmill.engine.planning.measuring import measured
from tokenmill.engine.planning.simulation import simulate
from tokenmill.engine.scheduler import Policy


def test_an_engine_gives_its_shape_and_the_cost_of_its_steps(
    tmp_path: Path, write_checkpoint: Callable[..., Any]
) -> None:
    write_checkpoint(tmp_path / "model", "llama")
    config = EngineConfig(token_budget=64, max_num_seqs=8, max_model_len=128)
    engine = Engine(load(str(tmp_path / "model"), device="cpu"), config)
    lengths = Lengths(requests=30, mean_prompt=40, mean_output=10)
    device = measured(engine, lengths, policy=Policy.SPLITFUSE)
    assert not engine.has_work
    assert (device.engine.token_budget, device.engine.max_num_seqs) == (64, 8)
    assert 0 < device.cost.seconds([(0, 1)]) <= device.cost.seconds([(0, 64)])
    assert len(simulate(device, lengths, ClosedLoop(4)).records) == 30
