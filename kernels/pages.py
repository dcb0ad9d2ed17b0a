"""`bring_in`: pages of fresh memory all at once, instead of one by one where they are first used.

A page that is first used within a step costs some 10 us there, as the other threads wait for it;
asked for in one call it costs 1 us.
"""

import ctypes
import functools
import mmap
from typing import Any

import torch

#: MADV_POPULATE_WRITE of Linux 5.14; older kernels and other systems say no, which does no harm.
_POPULATE_WRITE = 23


@functools.cache
def _madvise() -> Any:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def bring_in(tensor: torch.Tensor) -> None:
    """Have the whole pages of a contiguous tensor on a CPU in memory; their contents stay."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = _madvise()
    if begin < end and madvise is not None:
        madvise(begin, end - begin, _POPULATE_WRITE)
