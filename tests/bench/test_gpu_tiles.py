"""The bench of tiles without a GPU: a wrong candidate is left out, and a table can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tokenmill.kernels.tiles import Tile, read_table

BENCH = Path(__file__).resolve().parents[2] / "bench"
CODE = """
import gpu_tiles
gpu_tiles.CANDIDATES = {("decode_attention", 16): ((16, 48, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2))}
gpu_tiles.CHECKED = {"decode_attention": [(1, 33), (1, 80)]}
gpu_tiles.main()
"""


def test_candidates_are_checked_and_the_best_is_the_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "--out", tmp_path, "--tiny"],
        cwd=BENCH,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (records,) = json.loads((tmp_path / "gpu_tiles.json").read_text())["tiles"].values()
    assert "multiple of" in records[0]["error"]
    assert len(records[1]["ms"]) == 2
    table = read_table(tmp_path / "tile_tables" / "no_gpu.json")
    assert table == {"decode_attention 16 4 4": Tile(16, 64, 4, 3)}
