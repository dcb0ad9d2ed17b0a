"""`compiled`: a function compiled by numba for this processor, kept on disk for the next process.

Imported only where a compiled kernel is used; `is_available` asks first, at no cost.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any


@functools.cache
def is_available() -> bool:
    """Whether numba is there, and the processor multiplies and adds in one instruction."""
    if importlib.util.find_spec("numba") is None:
        return False
    from llvmlite.binding import get_process_triple

    return not get_process_triple().startswith("x86") or _has("fma")


@functools.cache
def has_wide_vectors() -> bool:
    """Whether there are registers for sixteen vectors of sixteen floats, as AVX-512 has."""
    return is_available() and _has("avx512f")


def _has(feature: str) -> bool:
    from llvmlite.binding import get_host_cpu_features

    return bool(get_host_cpu_features().get(feature, False))


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that `parallel.run` calls; compiling takes seconds the first time."""
    from numba import cfunc

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return cfunc(signature, cache=True)(function)
        except RuntimeError:  # no directory for it that can be written to
            return cfunc(signature)(function)

    return decorate
