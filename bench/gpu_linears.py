"""Claim to be tested on a GPU: linears of 4 and 8 bits, of fp8 and of fixed sums, beside cuBLAS.

With few rows weights are all that is read, so that 4 bits should take about a third of the time of
bfloat16; with many the product bounds all of them, and fp8 alone can win. Those of fixed sums are
what `deterministic` computes by: their time beside cuBLAS is what it costs. The shapes are the
MLP's of Llama-3.1-8B. `cases` is for `gpu_kernels.py`, which measures the ceilings in the same run.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn.functional import linear

from tokenmill.engine.models.fp8_linear import is_aligned, quantize_weight
from tokenmill.engine.models.packed_linear import IntPacking, PackedWeight
from tokenmill.engine.models.quantization import fp8_capability
from tokenmill.kernels.ops import fixed_linear

#: Name, shape, launch, bytes that must move, operations in bfloat16 that must be done.
LinearCase = tuple[str, str, Callable[[], object], float, float]


def cases(
    device: torch.device,
    dtype: torch.dtype,
    rows: Sequence[int],
    shapes: Sequence[tuple[int, int]],
) -> Iterator[LinearCase]:
    """Each form of each weight [out, in] with each number of rows.

    fp8 comes where the device has it; its operations count half, as they run at twice the rate.
    """
    for out, width in shapes:
        plain = torch.randn(out, width, device=device, dtype=dtype)
        forms: list[tuple[str, Callable[..., object], int, float]] = [
            ("linear", partial(linear, weight=plain), plain.nbytes, 1.0),
            ("linear, fixed", partial(fixed_linear, w=plain, bias=None), plain.nbytes, 1.0),
        ]
        for bits, group in ((4, 128), (8, 0)):
            weight = random_packed(IntPacking(bits, group), out, width, device)
            forms.append((f"linear, {bits} bits", weight, weight.nbytes, 1.0))
        if fp8_capability(device) >= (8, 9) and dtype == torch.bfloat16 and is_aligned(out, width):
            half = quantize_weight(plain)
            if half is not None:
                forms.append(("linear, fp8", half, half.nbytes, 0.5))
        for count in rows:
            x = torch.randn(count, width, device=device, dtype=dtype)
            moved = x.nbytes + count * out * dtype.itemsize
            operations = 2.0 * count * out * width
            for name, run, size, share in forms:
                shape = f"{count} x {width} -> {out}"
                yield name, shape, partial(run, x), size + moved, share * operations


def random_packed(packing: IntPacking, out: int, width: int, device: torch.device) -> PackedWeight:
    """A weight of random codes, whose products are about as large as a trained one's."""
    parts = packing.empty(out, width, device)
    parts["words"].random_(-(2**31), 2**31 - 1)
    parts["zeros"].fill_(2 ** (packing.bits - 1))
    parts["scales"].fill_(2.0 ** (1 - packing.bits) * width**-0.5)
    return packing.linear(parts)
