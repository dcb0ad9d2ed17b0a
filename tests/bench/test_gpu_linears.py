"""The linears of the GPU bench, on a CPU with tiny shapes: what they count and compute."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def gpu_linears() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "bench" / "gpu_linears.py"
    spec = importlib.util.spec_from_file_location("gpu_linears", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_linears"] = module
    spec.loader.exec_module(module)
    return module


def test_every_form_runs_and_moves_less_the_fewer_bits(gpu_linears: ModuleType) -> None:
    made = list(gpu_linears.cases(torch.device("cpu"), torch.bfloat16, (1, 5), ((32, 256),)))
    names = ["linear", "linear, fixed", "linear, 4 bits", "linear, 8 bits"]
    assert [case[0] for case in made[:4]] == names
    assert len(made) == 2 * 4
    for _, shape, run, _, operations in made:
        rows = int(shape.split()[0])
        assert run().shape == (rows, 32)
        assert operations == 2 * rows * 32 * 256
    plain, fixed, four, eight = (case[3] for case in made[:4])
    assert plain == fixed > eight > four > plain / 4
