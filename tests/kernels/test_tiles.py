import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenmill.kernels import tiles
from tokenmill.kernels.tiles import Tile


def test_without_a_table_tiles_are_by_rule() -> None:
    q, keys = torch.zeros(1, 4, 80), torch.zeros(1, 16, 2, 80)
    assert tiles.choose_tile("chunk_attention", q, keys) == Tile(64, 32, 4, 2)
    half = q.half(), keys.half()
    assert tiles.choose_tile("chunk_attention", *half) == Tile(64, 64, 4, 2)
    assert tiles.choose_tile("decode_attention", *half) == Tile(16, 64, 4, 3)
    assert tiles.tile_by_rule("chunk_attention", 128, 2, (9, 0)) == Tile(128, 64, 8, 3)
    assert tiles.tile_by_rule("chunk_attention", 256, 2, (8, 0)).keys == 32


def test_a_table_of_the_device_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tiles.tile_key("chunk_attention", 128, 2, 2)
    table = tmp_path / "some_gpu_80gb.json"
    table.write_text(json.dumps({"tiles": {key: [64, 128, 4, 5]}}))
    device = SimpleNamespace(name="Some GPU-80GB", major=9, minor=0)
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    chosen = tiles._tile.__wrapped__
    assert chosen("chunk_attention", 128, 2, 2, 0) == Tile(64, 128, 4, 5)
    assert chosen("chunk_attention", 64, 2, 2, 0) == Tile(128, 64, 8, 3)


def test_the_tables_that_are_there_can_be_read() -> None:
    for path in tiles.TABLES.glob("*.json"):
        assert tiles.read_table(path)
        assert path.stem == tiles.table_name(json.loads(path.read_text())["device"])
