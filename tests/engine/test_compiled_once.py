"""What Triton compiles for an engine on a GPU: all at first, and in real shapes without spills.

The launches are those of an engine whose GPU is not there (`tests/rig/launched.py`), in a process
of its own: in this one the kernels may be defined for the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OTHERS = ("llama", "mixtral", "gemma2")
RIG = Path(__file__).parent.parent / "rig" / "launched.py"


def launched(*arguments: str, cache: Path) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, RIG, *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("family", "modes"),
    [
        ("qwen3", ["--in-turns", "--packed"]),
        pytest.param("qwen3", [], marks=pytest.mark.slow),
        *(pytest.param(name, [], marks=pytest.mark.slow) for name in OTHERS),
        pytest.param("mixtral", ["--deterministic"], marks=pytest.mark.slow),
    ],
)
def test_no_kernel_is_compiled_while_serving(tmp_path: Path, family: str, modes: list[str]) -> None:
    found = launched("--traffic", family, *modes, cache=tmp_path)
    assert found["compiled"][0] >= 10
    assert set(found["compiled"]) == {found["compiled"][0]}
    assert found["launches"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("modes", [[], ["--deterministic"]], ids=["", "deterministic"])
@pytest.mark.parametrize("family", ["qwen3", *OTHERS])
def test_no_kernel_of_real_shapes_spills(tmp_path: Path, family: str, modes: list[str]) -> None:
    check_kernels(launched("--compile", family, *modes, cache=tmp_path))


@pytest.mark.slow
def test_nor_does_one_that_reads_and_writes_8_bits(tmp_path: Path) -> None:
    check_kernels(launched("--compile", "qwen3", "--kv-cache-dtype", "fp8", cache=tmp_path))


def check_kernels(kernels: list[dict[str, Any]]) -> None:
    assert len(kernels) >= 10
    for kernel in kernels:
        # Triton 3.9 keeps up to 24 bytes of chunk attention with heads of 256 there, 3.6 none.
        is_wide = "_paged_attention" in kernel["kernel"] and kernel["registers"] == 255
        assert kernel["local_bytes"] <= (24 if is_wide else 0), kernel
        assert kernel["shared_bytes"] <= 227 * 1024, kernel  # what capability 9.0 has
