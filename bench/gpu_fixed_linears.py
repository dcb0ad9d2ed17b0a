"""What linears of fixed sums cost beside cuBLAS, by tile, and whether all tiles have the same bits.

These are what `deterministic` computes by on a GPU (`kernels/fixed_linear.py`). For the linears of
two models and four numbers of rows: the time of cuBLAS, of every tile, of the one that is chosen;
added up for all layers and the head, that is the cost of a step's linears, and what a better table
of tiles could save of it. The head has no more rows than 256 sequences.

Where cuBLAS does not split its sums it may well have the same bits: how many elements differ is
told too. It splits none where it has no memory for that, by what vLLM sets on such a GPU; if then
nothing differs, and nothing is slower, cuBLAS is the better form for many rows:

    CUBLAS_WORKSPACE_CONFIG=:16:8 CUBLASLT_WORKSPACE_SIZE=1 python bench/gpu_fixed_linears.py ...

    python bench/gpu_fixed_linears.py --out OUTDIR [--seconds 60] [--tiny]

`--tiny` runs the same once with tiny shapes: on a CPU with TRITON_INTERPRET=1.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_device import check_device, gpu_arguments, time_ms, write_gpu_result
from torch.nn.functional import linear

from tokenmill.kernels.fixed_linear import Tile, choose_tile, fixed_linear, is_large, tiles

#: Layers, outputs and inputs of their linears, and of the head.
Shapes = tuple[int, tuple[tuple[int, int], ...], tuple[int, int]]
MODELS: dict[str, Shapes] = {
    "Qwen3-0.6B": (
        28,
        ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
        (151936, 1024),
    ),
    "Llama-3.1-8B": (
        32,
        ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
        (128256, 4096),
    ),
}
TINY_MODELS: dict[str, Shapes] = {"tiny": (2, ((48, 32), (32, 64)), (97, 32))}
ROWS, MOST_HEAD_ROWS = (1, 64, 256, 2048), 256
#: Beside those of the kernel's table: with 128 inputs, which others hold to be another sum.
MORE_TILES = (Tile(64, 16, 128, 4, 8), Tile(64, 64, 128, 4, 4))


@dataclass(frozen=True, slots=True)
class Case:
    """A linear of a model, `count` times in a step of `rows`; its own rows may be fewer."""

    model: str
    rows: int
    count: int
    shape: tuple[int, int, int]  # M, N, K


def cases(models: dict[str, Shapes], all_rows: tuple[int, ...]) -> Iterator[Case]:
    """Of each model and number of rows together."""
    for model, (layers, linears, head) in models.items():
        for rows in all_rows:
            for shape in linears:
                yield Case(model, rows, layers, (rows, *shape))
            yield Case(model, rows, 1, (min(rows, MOST_HEAD_ROWS), *head))


def measure(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Times in ms: of cuBLAS, of the tile that is chosen, and of all by their sizes."""
    num_rows, outputs, inputs = case.shape
    generator = torch.Generator(device).manual_seed(sum(case.shape))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, w = random(num_rows, inputs), random(outputs, inputs) * inputs**-0.5
    chosen = choose_tile(num_rows, outputs, dtype, is_large=is_large(device))
    expected = fixed_linear(x, w)
    differ, times = [], {}
    for tile in candidates(num_rows, chosen, device):
        name = "x".join(str(size) for size in tile[:3])
        run = partial(fixed_linear, x, w, tile=tile)
        if not torch.equal(run(), expected):
            differ.append(name)
        times[name] = time_ms(run)[0]
    return {
        "model": case.model,
        "rows": case.rows,
        "count": case.count,
        "shape": f"{num_rows} x {inputs} -> {outputs}",
        "cublas_ms": time_ms(partial(linear, x, w))[0],
        "fixed_ms": times["x".join(str(size) for size in chosen[:3])],
        "tiles_ms": times,
        "other_bits": differ,
        "cublas_elements_differ": int((linear(x, w) != expected).sum()),
    }


def candidates(num_rows: int, chosen: Tile, device: torch.device) -> list[Tile]:
    """The tiles that make sense for so many rows, the one that is chosen among them."""
    known = [tile for _, tile in tiles(is_large=is_large(device))]
    if is_large(device):
        known += MORE_TILES
    fit = [t for t in known if (t.rows == 64 or num_rows > 64) and t.outputs * 16 >= num_rows]
    return fit if chosen in fit else [chosen, *fit]


def step_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """All linears of a step: cuBLAS, as tiles are chosen, and with the best of them."""

    def total(time_of: Callable[[dict[str, Any]], float]) -> float:
        return sum(int(record["count"]) * time_of(record) for record in records)

    cublas = total(lambda record: record["cublas_ms"])
    fixed = total(lambda record: record["fixed_ms"])
    return {
        "model": records[0]["model"],
        "rows": records[0]["rows"],
        "cublas_ms": cublas,
        "fixed_ms": fixed,
        "best_tiles_ms": total(lambda record: min(record["tiles_ms"].values())),
        "ratio": fixed / cublas,
        "other_bits": sorted({name for record in records for name in record["other_bits"]}),
        "cublas_differs": sum(record["cublas_elements_differ"] > 0 for record in records),
        "linears": len(records),
    }


def main() -> None:
    options = gpu_arguments(__doc__, 60.0).parse_args()
    check_device(options)
    ends = time.perf_counter() + options.seconds
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = torch.bfloat16 if has_gpu else torch.float16
    models, rows = (TINY_MODELS, (1, 70)) if options.tiny else (MODELS, ROWS)
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    planned = list(cases(models, rows))
    with torch.inference_mode():
        for case in planned:
            if time.perf_counter() > ends:
                print("no time is left for the rest")
                break
            found.setdefault((case.model, case.rows), []).append(measure(case, device, dtype))
            done = {
                key: records
                for key, records in found.items()
                if len(records) == sum((c.model, c.rows) == key for c in planned)
            }
            steps = [step_of(records) for records in done.values()]
            linears = [record for records in found.values() for record in records]
            content = {"is_tiny": options.tiny, "steps": steps, "linears": linears}
            write_gpu_result(options.out, "gpu_fixed_linears", content)
    for step in steps:
        print(
            "{model}, {rows} rows: linears {fixed_ms:.2f} ms, cuBLAS {cublas_ms:.2f} "
            "({ratio:.2f}), with the best tiles {best_tiles_ms:.2f}; "
            "tiles of other bits: {other_bits}; cuBLAS has other bits in {cublas_differs} of "
            "{linears} shapes".format(**step)
        )


if __name__ == "__main__":
    main()
