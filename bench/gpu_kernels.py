"""Claim to be tested on a GPU: every kernel's time against its roofline, measured in the same run.

The ceilings are the best of copying memory and of a large product of matrices in bfloat16.
`roofline` is the share of the longer of what moving and computing take at their ceilings; the
cases and their needs are in `gpu_cases.py`. Times are the device's, with a cold L2 cache.

    python bench/gpu_kernels.py --out OUTDIR [--seconds 150] [--tiny]

`--tiny` runs the same code once with tiny shapes in float32: on a CPU with TRITON_INTERPRET=1.
"""

import time
import traceback
from collections.abc import Callable

import torch
from gpu_cases import MAKERS, TINY, Case, Scale
from gpu_device import (
    check_device,
    gpu_arguments,
    measure_gpu_ceilings,
    time_ms,
    write_gpu_result,
)
from roofline import Ceilings

#: Shorter ones are timed in a graph too: a launch may take longer than they do.
SHORT_MS = 0.5


def timed(run: Callable[[], object]) -> dict[str, float]:
    """`time_ms`; of what is short also in a graph, where no launch is waited for."""
    median, low, high = time_ms(run)
    found = {"ms": median, "ms_low": low, "ms_high": high}
    if torch.cuda.is_available() and median < SHORT_MS and (replay := captured(run)):
        median, low, high = time_ms(replay)
        found |= {"ms": median, "ms_low": low, "ms_high": high, "launched_ms": found["ms"]}
    return found


def captured(run: Callable[[], object]) -> Callable[[], None] | None:
    """The same as a CUDA graph; None where it cannot be one."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"not captured: {error}", flush=True)
        return None
    replay: Callable[[], None] = graph.replay
    return replay


def measure(scale: Scale, ends: float, write: Callable[[dict[str, object]], None]) -> None:
    """Every case until the clock says `ends`; what was left out, or failed, is named."""
    ceilings = measure_gpu_ceilings()
    figures: list[dict[str, object]] = []
    left_out: list[str] = []
    failed: list[str] = []
    for maker in MAKERS:
        try:
            for case in maker(scale):
                if time.perf_counter() > ends:
                    left_out.append(maker.__name__)
                    break
                figures.append(figure_of(case, ceilings))
        except Exception as error:  # noqa: BLE001 - whatever a kernel may raise
            traceback.print_exc()
            failed.append(f"{maker.__name__}: {type(error).__name__}: {error}"[:300])
        limits = {"bytes_per_s": ceilings.bytes_per_s, "flops_per_s": ceilings.flops_per_s}
        write({"ceilings": limits, "kernels": figures, "left_out": left_out, "failed": failed})
    if failed:
        raise SystemExit("\n".join(failed))


def figure_of(case: Case, ceilings: Ceilings) -> dict[str, object]:
    """Its time beside the roofline."""
    took = timed(case.run)
    memory_ms = 1e3 * case.bytes / ceilings.bytes_per_s
    computing_ms = 1e3 * case.flops / ceilings.flops_per_s
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        **took,
        "bound": "memory" if memory_ms >= computing_ms else "computing",
        "roofline": max(memory_ms, computing_ms) / took["ms"],
    }


def main() -> None:
    options = gpu_arguments(__doc__, 150).parse_args()
    check_device(options)
    scale = TINY if options.tiny else Scale(torch.device("cuda"), torch.bfloat16)

    def write(found: dict[str, object]) -> None:
        write_gpu_result(options.out, "gpu_kernels", {"is_tiny": options.tiny, **found})

    with torch.inference_mode():
        measure(scale, time.perf_counter() + options.seconds, write)


if __name__ == "__main__":
    main()
