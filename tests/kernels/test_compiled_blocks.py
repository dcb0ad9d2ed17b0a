"""The compiled dequantization of GGUF blocks: the bits of the `gguf` package's, of every type."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tokenmill.engine import gguf
from tokenmill.kernels import compiler, cpu_ops

pytestmark = pytest.mark.skipif(
    not compiler.has_wide_vectors(), reason="this processor has no AVX-512"
)
KINDS = [
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q8_0,
]


def blocks_of(kind: GGMLQuantizationType, count: int) -> np.ndarray:
    """Random codes, with scales that float16 has: great, small, negative, subnormal, zero."""
    generator = np.random.default_rng(count)
    _, size = GGML_QUANT_SIZES[kind]
    stored = generator.integers(0, 256, (count, size), dtype=np.uint8)
    scales = np.array([1.0, -0.3, 65504.0, 6e-8, 1e-5, 0.0, -0.0], np.float16)
    for column in range(2 if kind is GGMLQuantizationType.Q4_1 else 1):
        chosen = generator.choice(scales, count)
        stored[:, 2 * column : 2 * column + 2] = chosen[:, None].view(np.uint8)
    return stored.reshape(-1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [0, 1, 3, 1023, 1024, 1025, 5000])
def test_values_have_the_bits_of_the_package(kind: GGMLQuantizationType, count: int) -> None:
    stored = blocks_of(kind, count)
    values = torch.full((32 * count + 1,), torch.nan)
    cpu_ops.dequantize(stored, kind, values[:-1])
    if count:
        expected = torch.from_numpy(dequantize(stored[None], kind)).flatten()
        assert torch.equal(values[:-1].view(torch.int32), expected.view(torch.int32))
    assert values[-1].isnan(), "something was written behind the end"


def test_blocks_may_begin_anywhere() -> None:
    kind = GGMLQuantizationType.Q4_1
    stored = blocks_of(kind, 40)
    apart = np.concatenate([np.zeros(3, np.uint8), stored])[3:]
    values, others = torch.empty(40 * 32), torch.empty(40 * 32)
    cpu_ops.dequantize(stored, kind, values)
    cpu_ops.dequantize(apart, kind, others)
    assert torch.equal(values.view(torch.int32), others.view(torch.int32))


def test_sizes_are_those_of_the_package() -> None:
    from tokenmill.kernels import compiled_blocks

    for kind, size in compiled_blocks.BLOCK_BYTES.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == (compiled_blocks.BLOCK, size)
    for kind, sizes in gguf._SIZES.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == sizes
    assert cpu_ops.can_dequantize(GGMLQuantizationType.Q8_0)
    assert not cpu_ops.can_dequantize(GGMLQuantizationType.Q6_K)


@pytest.mark.parametrize(
    ("kind", "size", "values"),
    [(14, 34, torch.empty(32)), (8, 33, torch.empty(32)), (8, 34, torch.empty(64)[::2])],
)
def test_what_does_not_fit_is_refused(kind: int, size: int, values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="blocks must be of a type"):
        cpu_ops.dequantize(np.zeros(size, np.uint8), kind, values)
