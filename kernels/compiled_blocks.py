"""`dequantize`: blocks of GGUF's simple types to float32, compiled, on processors with AVX-512.

    type  bytes of a block of 32 values            a value of it
    Q4_0  d float16, 16 of two codes of 4 bits     d * (code - 8)
    Q4_1  d, m float16, 16 of two codes of 4 bits  d * code + m
    Q8_0  d float16, 32 codes of int8              d * code

The low halves of a block's bytes are its first 16 values. A product is rounded before m is added,
as numpy does it, so the numbers have the same bits as those of the `gguf` package.
Format: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types

from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import (
    INDEX,
    INTS,
    VECTOR,
    WIDTH,
    Emitter,
    as_function,
    fetch_add,
    int64s,
)

BLOCK = 2 * WIDTH
#: Bytes of a block, by the number that GGUF gives the type.
_Q4_0, _Q4_1, _Q8_0 = 2, 3, 8
BLOCK_BYTES = {_Q4_0: 18, _Q4_1: 20, _Q8_0: 34}
#: Blocks that a thread takes at a time.
_ITEM = 1024

_BYTE, _HALF = ir.IntType(8), ir.HalfType()
_BYTES = ir.VectorType(_BYTE, WIDTH)


def _expand(kind: int) -> Any:
    """Of (source, target, count): the values of `count` blocks at an address."""

    def half(e: Emitter, address: Any) -> Any:
        value = e.builder.load(e.pointer(address, kind=_HALF), align=1)
        return e.splat(e.builder.fpext(value, VECTOR.element))

    def codes(e: Emitter, address: Any) -> list[Any]:
        """32 of them, as vectors of int32."""
        if kind == _Q8_0:
            places = [address, e.builder.add(address, INDEX(WIDTH))]
            loaded = [e.builder.load(e.pointer(place, kind=_BYTES), align=1) for place in places]
            return [e.builder.sext(vector, INTS) for vector in loaded]
        loaded = e.builder.zext(e.builder.load(e.pointer(address, kind=_BYTES), align=1), INTS)
        low = e.builder.and_(loaded, ir.Constant(INTS, [15] * WIDTH))
        both = [low, e.builder.lshr(loaded, ir.Constant(INTS, [4] * WIDTH))]
        middle = ir.Constant(INTS, [8 if kind == _Q4_0 else 0] * WIDTH)
        return [e.builder.sub(code, middle) for code in both]

    def emit(e: Emitter, source: Any, target: Any, count: Any) -> None:
        def body(number: Any, state: list[Any]) -> list[Any]:
            at = e.builder.add(source, e.builder.mul(number, INDEX(BLOCK_BYTES[kind])))
            scale = half(e, at)
            least = half(e, e.builder.add(at, INDEX(2))) if kind == _Q4_1 else None
            at = e.builder.add(at, INDEX(2 if least is None else 4))
            out = e.step(target, e.builder.mul(number, INDEX(BLOCK)))
            for place, code in enumerate(codes(e, at)):
                value = e.builder.fmul(scale, e.builder.sitofp(code, VECTOR))
                value = value if least is None else e.builder.fadd(value, least)
                e.store(value, out, WIDTH * place)
            return state

        e.loop(count, [], body)

    return as_function(emit, types.void, 3)


_expand_q4_0, _expand_q4_1, _expand_q8_0 = map(_expand, BLOCK_BYTES)


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (8,))
    kind, block_bytes, num_blocks = given[3], given[4], given[5]
    first = fetch_add(data + 8, 1) * _ITEM
    while first < num_blocks:
        source, target = given[6] + first * block_bytes, given[7] + 4 * first * BLOCK
        count = min(_ITEM, num_blocks - first)
        if kind == _Q4_0:
            _expand_q4_0(source, target, count)
        elif kind == _Q4_1:
            _expand_q4_1(source, target, count)
        else:
            _expand_q8_0(source, target, count)
        first = fetch_add(data + 8, 1) * _ITEM


def dequantize(stored: "np.ndarray[Any, Any]", kind: int, values: torch.Tensor) -> None:
    """Write what `stored`, the bytes of blocks of a type of `BLOCK_BYTES`, stands for to `values`.

    Raises:
        ValueError: another type, or not as many bytes as the float32 values need; or either of them
            is not contiguous.
    """
    block_bytes, num_blocks = BLOCK_BYTES.get(kind, 0), values.numel() // BLOCK
    fits = stored.nbytes == num_blocks * block_bytes and values.numel() == num_blocks * BLOCK
    is_plain = stored.flags.c_contiguous and values.is_contiguous()
    if not block_bytes or not fits or values.dtype != torch.float32 or not is_plain:
        raise ValueError(
            f"contiguous blocks must be of a type of {sorted(BLOCK_BYTES)} and fill contiguous "
            f"float32 values, got {stored.nbytes} bytes of type {kind} for {values.numel()} of "
            f"{values.dtype}"
        )
    if num_blocks:
        addresses = [stored.ctypes.data, values.data_ptr()]
        call = Call(_work, [kind, block_bytes, num_blocks, *addresses])
        run(call, -(-num_blocks // _ITEM))
