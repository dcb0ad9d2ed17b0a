"""The tiles of attention on one GPU: each candidate checked, then timed; the best are its table.

A candidate has to give what plain torch gives, within roundings, on ragged chunks; one that does
not, or that does not compile, is named and left out. Then it is timed with the heads of
Llama-3.1-8B at two shapes; the best has the lowest product of times. OUTDIR/gpu_tiles.json has all
times, with those of decoding programs that take more or fewer parts of the keys, and
OUTDIR/tile_tables/NAME.json is what is committed as `kernels/tile_tables/NAME.json`.

    python bench/gpu_tiles.py --out OUTDIR [--seconds 110] [--tiny]

`--tiny` runs the same once with tiny shapes: on a CPU with TRITON_INTERPRET=1.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from gpu_device import check_device, gpu_arguments, gpu_provenance, time_ms, write_gpu_result
from triton.errors import TritonError

from tokenmill.kernels import reference
from tokenmill.kernels.decode_attention import PART, choose_parts, decode_attention
from tokenmill.kernels.paged_attention import paged_attention
from tokenmill.kernels.tiles import Tile, num_processors, table_name, tile_key

#: Most that a result in bfloat16 may differ, of values up to 4: weights and result are rounded.
TOLERANCE = 3e-2
CHECKED = {
    "chunk_attention": [(200, 700), (1, 33), (64, 64), (1, 1)],
    "decode_attention": [(1, 700), (1, 1), (1, 64), (1, 2049)],
}
TIMED = {
    "chunk_attention": ([(8192, 8192)], [(1024, 4096), (1024, 1024)]),
    "decode_attention": ([(1, 2048)] * 64, [(1, 16384)] * 4),
}
TINY = {
    "chunk_attention": ([(20, 40)], [(5, 33), (1, 1)]),
    "decode_attention": ([(1, 40)] * 2, [(1, 70)]),
}
#: Sequences and tokens of each for which programs of more or fewer parts are timed.
SPLIT = [(1, 2048), (1, 32768), (8, 8192), (64, 2048), (256, 512)]
CHANNELS = 128
#: Rows, keys, warps, stages; those of the rule come first.
CANDIDATES = {
    ("chunk_attention", 128): (
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 32, 8, 4),
        (128, 128, 8, 2),
    ),
    ("chunk_attention", 64): (
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (64, 64, 4, 3),
        (128, 128, 8, 2),
        (128, 64, 4, 3),
    ),
    ("decode_attention", 128): (
        (16, 64, 4, 3),
        (16, 64, 4, 2),
        (16, 64, 4, 4),
        (16, 64, 2, 3),
        (16, 32, 4, 4),
        (16, 128, 4, 2),
        (16, 128, 8, 2),
    ),
    ("decode_attention", 64): ((16, 64, 4, 3), (16, 64, 4, 4), (16, 128, 4, 3), (16, 64, 2, 3)),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What a table has one tile for."""

    kernel: str
    head_dim: int
    cache_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how large."""

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int]
    block_size: int


Attend = Callable[..., torch.Tensor]


def attention(
    place: Place, kind: Kind, chunks: list[tuple[int, int]]
) -> tuple[Callable[[Attend], torch.Tensor], Callable[[], torch.Tensor]]:
    """Chunks of (queries, context) at random: by a kernel that is given, and by plain torch."""
    generator = torch.Generator(place.device).manual_seed(len(chunks))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=place.device).to(place.dtype)

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=place.device)

    width = max(-(-context // place.block_size) for _, context in chunks)
    num_blocks = len(chunks) * width
    shape = (num_blocks, place.block_size, place.heads[1], kind.head_dim)
    order = torch.randperm(num_blocks, generator=generator, device=place.device)
    tensors = (
        random(sum(n for n, _ in chunks), place.heads[0], kind.head_dim),
        random(*shape).to(kind.cache_dtype),
        random(*shape).to(kind.cache_dtype),
    )
    lengths = {
        "cu_seqlens_q": integers([0, *accumulate(n for n, _ in chunks)]),
        "context_lens": integers([context for _, context in chunks]),
        "block_tables": order.to(torch.int32).view(len(chunks), width),
    }
    scale = kind.head_dim**-0.5
    longest = max(n for n, _ in chunks)
    plain: Attend = partial(reference.paged_attention, max_query_len=longest)
    return (
        lambda attend: attend(*tensors, **lengths, scale=scale),
        lambda: plain(*tensors, **lengths, scale=scale),
    )


def by_tile(kind: Kind, tile: Tile) -> Attend:
    if kind.kernel == "decode_attention":
        return partial(decode_attention, tile=tile)
    return partial(paged_attention, tile=tile, max_query_len=1)


def error_of(run: Callable[[Attend], torch.Tensor], attend: Attend, expected: torch.Tensor) -> str:
    """What is wrong with a candidate's result; empty if nothing is."""
    try:
        found = run(attend).float()
    except (ValueError, RuntimeError, TritonError) as error:  # refused, or does not compile
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    far = (found - expected.float()).abs().max().item()
    return "" if far <= TOLERANCE else f"differs by {far:.3g}"


def kinds(device: torch.device, dtype: torch.dtype) -> Iterator[Kind]:
    for kernel, head_dim in CANDIDATES:
        yield Kind(kernel, head_dim, dtype)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        yield Kind("decode_attention", 128, torch.float8_e4m3fn)


def measure_kind(
    place: Place, kind: Kind, *, is_tiny: bool, has_time: Callable[[], bool]
) -> list[dict[str, Any]]:
    """A record for each candidate: its tile, and its times or its error."""
    checked, plain = attention(place, kind, CHECKED[kind.kernel])
    expected = plain()
    shapes = (TINY if is_tiny else TIMED)[kind.kernel]
    timed = [attention(place, kind, chunks)[0] for chunks in shapes]
    records: list[dict[str, Any]] = []
    candidates = [Tile(*sizes) for sizes in CANDIDATES[kind.kernel, kind.head_dim]]
    for tile in candidates[:2] if is_tiny else candidates:
        record: dict[str, Any] = {"tile": astuple(tile)}
        records.append(record)
        if not has_time():
            record["error"] = "no time was left"
            continue
        attend = by_tile(kind, tile)
        if error := error_of(checked, attend, expected):
            record["error"] = error
        else:
            record["ms"] = [time_ms(partial(run, attend))[0] for run in timed]
    return records


def measure_parts(place: Place, *, is_tiny: bool) -> list[dict[str, Any]]:
    """Times of decode attention by the parts that a program takes, and what would be chosen."""
    kind = Kind("decode_attention", CHANNELS, place.dtype)
    records: list[dict[str, Any]] = []
    for batch, context in [(2, 300)] if is_tiny else SPLIT:
        run, _ = attention(place, kind, [(1, context)] * batch)
        counts = [1, 4] if is_tiny else [1, 2, 4, 8, 16]
        times = {n: time_ms(partial(run, partial(decode_attention, parts=n)))[0] for n in counts}
        num_parts = -(-context // PART)
        chosen = choose_parts(batch, place.heads[1], num_parts, num_processors(place.device))
        records.append({"shape": f"{batch} x {context}", "ms": times, "chosen": chosen})
    return records


def best(records: list[dict[str, Any]]) -> object:
    """The tile of the lowest product of times; None if there is none."""
    right = [record for record in records if "ms" in record]
    return min(right, key=lambda record: math.prod(record["ms"]))["tile"] if right else None


def write_table(out: Path, tiles: dict[str, object]) -> Path:
    """The table as it is committed."""
    provenance = gpu_provenance()
    name = str(provenance["gpu"] or "no GPU")
    path = out / "tile_tables" / f"{table_name(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": name, "tiles": tiles, "provenance": provenance}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def main() -> None:
    options = gpu_arguments(__doc__, 110.0).parse_args()
    check_device(options)
    ends = time.perf_counter() + options.seconds
    has_gpu = torch.cuda.is_available()
    place = Place(torch.device("cuda"), torch.bfloat16, (32, 8), 64)
    if not has_gpu or options.tiny:
        device = torch.device("cuda" if has_gpu else "cpu")
        place = Place(device, torch.bfloat16 if has_gpu else torch.float32, (4, 1), 64)
    found: dict[str, list[dict[str, Any]]] = {}
    with torch.inference_mode():
        for kind in kinds(place.device, place.dtype):
            sizes = place.dtype.itemsize, kind.cache_dtype.itemsize
            key = tile_key(kind.kernel, kind.head_dim, *sizes)
            found[key] = measure_kind(
                place, kind, is_tiny=options.tiny, has_time=lambda: time.perf_counter() < ends
            )
            for record in found[key]:
                print(key, record["tile"], record.get("ms") or record.get("error"), flush=True)
            write_gpu_result(options.out, "gpu_tiles", {"is_tiny": options.tiny, "tiles": found})
    with torch.inference_mode():
        parts = measure_parts(place, is_tiny=options.tiny)
    for record in parts:
        print("parts of a program", record["shape"], record["ms"], "chosen:", record["chosen"])
    content = {"is_tiny": options.tiny, "tiles": found, "parts": parts}
    write_gpu_result(options.out, "gpu_tiles", content)
    chosen = {key: best(records) for key, records in found.items()}
    path = write_table(options.out, {key: tile for key, tile in chosen.items() if tile})
    print(f"best: {chosen}\nthe table: {path}")


if __name__ == "__main__":
    main()
