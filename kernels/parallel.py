"""`run`: a compiled function on all of torch's threads.

They are torch's own: libgomp starts a function on its pool for whoever asks, so no second pool
fights with torch's for the cores.
"""

import ctypes
import functools
import logging
import struct
from pathlib import Path
from typing import Any

import torch

LOGGER = logging.getLogger(__name__)


@functools.cache
def _start() -> Any:
    """GOMP_parallel of the libgomp that torch has loaded; None where there is none."""
    path = _torchs_libgomp(_loaded_libgomps())
    if path is None:
        return None
    start = ctypes.CDLL(path).GOMP_parallel
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


def _loaded_libgomps() -> set[str]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    return {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}


def _torchs_libgomp(paths: set[str]) -> str | None:
    """The one of `paths` that torch brings, or the only one; other packages may load their own."""
    package = Path(torch.__file__).resolve().parent
    places = {package, package.with_name("torch.libs")}
    chosen = sorted({path for path in paths if places & set(Path(path).parents)} or paths)
    if len(chosen) == 1:
        return chosen[0]
    found = ", ".join(chosen) or "none"
    LOGGER.warning("compiled kernels run on one thread: torch's libgomp is not known of %s", found)
    return None


def run(function: Any, arguments: list[int | float], num_items: int) -> int:
    """Call a cfunc of one pointer once on each thread; they share the items by themselves.

    Returns the first of the counters, as the function has left it.

    The pointer is to int64 or float64, 8 bytes each: two counters that are 0, of the threads that
    have begun and of the items taken; the number of items; the arguments.
    """
    kinds = "".join("d" if isinstance(value, float) else "q" for value in arguments)
    packed = struct.pack(f"qqq{kinds}", 0, 0, num_items, *arguments)
    data = ctypes.create_string_buffer(packed, len(packed))
    num_threads = min(torch.get_num_threads(), num_items)
    start = _start() if num_threads > 1 else None
    if start is None:
        function.ctypes(ctypes.addressof(data))
    else:
        start(function.address, ctypes.addressof(data), num_threads, 0)
    return int(struct.unpack_from("q", data)[0])
