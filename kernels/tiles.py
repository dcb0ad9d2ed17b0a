"""Tiles of attention: what a program takes at once, from a table of the GPU or else by rule.

| kernel           | rows of a tile                 | for                              |
| ---------------- | ------------------------------ | -------------------------------- |
| chunk_attention  | queries times heads of a group | chunks, and with fixed tiles all |
| decode_attention | heads of a group               | chunks of one query              |

There is one tile of each for all steps, so that none is compiled while requests wait.

A table is `tile_tables/NAME.json`, written by `bench/gpu_tiles.py` on that GPU and committed; NAME
is the device's in lower case with underscores. It has tiles by kernel, channels (a power of two),
and bytes of an element of queries and of the cache. Nothing is tuned live.

Of a row's bits, `keys` decides, as do `rows` and `warps` where they make other instructions of the
tensor cores. `stages`, how far reads run ahead, is time alone.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

TABLES = Path(__file__).with_name("tile_tables")


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of queries, keys, warps of 32 threads, and stages of the loop over keys."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tile(kernel: str, q: torch.Tensor, k_cache: torch.Tensor) -> Tile:
    """The tile of one of the kernels above for q [T, Hq, D] and a cache on its device."""
    channels = max(16, 1 << (q.shape[2] - 1).bit_length())
    index = q.device.index or 0
    return _tile(kernel, channels, q.itemsize, k_cache.itemsize, index if q.is_cuda else None)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere 1."""
    return _processors(device.index or 0) if device.type == "cuda" else 1


def table_name(device_name: str) -> str:
    """The file of a device's table, without its suffix."""
    return re.sub("[^a-z0-9]+", "_", device_name.lower()).strip("_")


def tile_key(kernel: str, channels: int, q_bytes: int, cache_bytes: int) -> str:
    """What a table has a tile by."""
    return f"{kernel} {channels} {q_bytes} {cache_bytes}"


def tile_by_rule(kernel: str, channels: int, q_bytes: int, capability: tuple[int, int]) -> Tile:
    """What compiled code says: no spills, and what shared memory holds. Not measured.

    On compute capability 9 a tall tile has two groups of four warps, each with rows of its own, and
    one program fills a processor; elsewhere 96 KiB of shared memory have to do.
    """
    is_wide = channels > 128
    keys = 32 if q_bytes == 4 or is_wide else 64
    if kernel == "decode_attention":
        return Tile(16, keys, 4, 2 if q_bytes == 4 and is_wide else 3)
    if q_bytes == 4:  # no tensor cores, and operands in registers
        return Tile(32, 16, 4, 1) if is_wide else Tile(64, keys, 4, 2)
    if kernel == "chunk_attention" and capability[0] == 9:
        return Tile(128, keys, 8, 3)
    return Tile(64, keys, 4, 2)


def read_table(path: Path) -> dict[str, Tile]:
    """Tiles by `tile_key`; none if there is no such file."""
    if not path.exists():
        return {}
    return {key: Tile(*tile) for key, tile in json.loads(path.read_text())["tiles"].items()}


@cache
def _tile(kernel: str, channels: int, q_bytes: int, cache_bytes: int, index: int | None) -> Tile:
    if index is None:
        return tile_by_rule(kernel, channels, q_bytes, (0, 0))
    device = torch.cuda.get_device_properties(index)
    table = read_table(TABLES / f"{table_name(device.name)}.json")
    by_rule = tile_by_rule(kernel, channels, q_bytes, (device.major, device.minor))
    return table.get(tile_key(kernel, channels, q_bytes, cache_bytes), by_rule)


@cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
