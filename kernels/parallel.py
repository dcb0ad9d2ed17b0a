"""`Call`: a compiled function with its arguments, and `run`: on all of torch's threads.

They are torch's own: libgomp starts a function on its pool for whoever asks, so no second pool
fights with torch's for the cores.
"""

import ctypes
import functools
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LOGGER = logging.getLogger(__name__)


@functools.cache
def _libgomp() -> Any:
    """The libgomp that torch has loaded; None where there is none."""
    path = _torchs_libgomp(_loaded_libgomps())
    if path is None:
        return None
    libgomp = ctypes.CDLL(path)
    libgomp.GOMP_parallel.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    )
    libgomp.GOMP_parallel.restype = None
    return libgomp


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


@dataclass(frozen=True, slots=True)
class Call:
    """A cfunc of one pointer, called once on each thread; they share the items by themselves.

    The pointer is to int64 or float64, 8 bytes each: two counters that are 0, of the threads that
    have begun and of the items taken; a 0; the arguments. A name stands for a number that a
    `Program` is given at each run.
    """

    function: Any
    arguments: Sequence[int | float | str]

    def packed(self) -> bytes:
        """What the pointer is to, with 0 for names."""
        values = [0 if isinstance(value, str) else value for value in self.arguments]
        kinds = "".join("d" if isinstance(value, float) else "q" for value in values)
        return struct.pack(f"qqq{kinds}", 0, 0, 0, *values)


def run(call: Call, num_items: int) -> int:
    """Run a call without names; returns the first of the counters, as the function has left it."""
    packed = call.packed()
    data = ctypes.create_string_buffer(packed, len(packed))
    start(call.function, ctypes.addressof(data), min(torch.get_num_threads(), num_items))
    return int(struct.unpack_from("q", data)[0])


def start(function: Any, data: int, num_threads: int) -> None:
    """Call a cfunc of one pointer on `num_threads` of torch's threads, or on fewer."""
    begin = _libgomp().GOMP_parallel if num_threads > 1 and _libgomp() else None
    if begin is None:
        function.ctypes(data)
    else:
        begin(function.address, data, num_threads, 0)


@functools.cache
def count_threads() -> int:
    """Address of the function that says how many threads `start` has started; 0: always one."""
    libgomp = _libgomp()
    return ctypes.cast(libgomp.omp_get_num_threads, ctypes.c_void_p).value or 0 if libgomp else 0
