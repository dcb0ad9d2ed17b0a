"""`run`: a compiled function on all of torch's threads.

They are torch's own: libgomp starts a function on its pool for whoever asks, so no second pool
fights with torch's for the cores.
"""

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any

import torch


@functools.cache
def _start() -> Any:
    """GOMP_parallel of the libgomp that torch has loaded; None where there is none."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    if len(paths) != 1:
        return None
    start = ctypes.CDLL(paths.pop()).GOMP_parallel
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


def run(function: Any, arguments: list[int | float], num_items: int) -> None:
    """Call a cfunc of one pointer once on each thread; they share the items by themselves.

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
