import functools
from collections.abc import Callable

import pytest
import torch

from tokenmill.kernels import reference
from tokenmill.kernels.packed_codes import pack_codes, unpack_codes

Compare = Callable[[torch.Tensor, torch.Tensor], None]
Tensors = dict[str, torch.Tensor]


def weight(
    out: int, depth: int, bits: int, group_size: int, device: torch.device
) -> tuple[Tensors, torch.Tensor]:
    """What the kernel takes for a random weight, and the weight [out, depth], by its definition."""
    generator = torch.Generator().manual_seed(out + depth)
    span = group_size or depth
    groups = -(-depth // span)
    codes = torch.randint(0, 2**bits, (out, depth), generator=generator)
    zeros = torch.randint(0, 2**bits, (groups, out), generator=generator)
    scales = (torch.rand(groups, out, generator=generator) + 0.1) * 2.0**-bits * depth**-0.5
    floats = torch.empty(out, depth)
    for k in range(depth):
        floats[:, k] = (codes[:, k] - zeros[k // span]) * scales[k // span]
    words = pack_codes(codes.to(torch.uint8), bits).transpose(0, 1).contiguous()
    parts = {"words": words, "scales": scales, "zeros": zeros.to(torch.uint8)}
    return {name: part.to(device) for name, part in parts.items()}, floats.to(device)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("depth", [1, 100, 128, 300])
def test_codes_come_out_as_they_went_in(bits: int, depth: int) -> None:
    codes = torch.randint(0, 2**bits, (5, depth), generator=torch.Generator().manual_seed(depth))
    words = pack_codes(codes.to(torch.uint8), bits)
    assert words.shape == (5, -(-depth // 128), 4 * bits)
    assert torch.equal(unpack_codes(words, bits, depth), codes.int())


@pytest.mark.parametrize("bits", [4, 8])
def test_part_j_of_word_w_is_input_j_times_w(bits: int) -> None:
    """The layout itself, which both sides of a round trip could get wrong alike."""
    codes = (torch.arange(256) * 7 % 2**bits).to(torch.uint8)[None]
    (words,) = pack_codes(codes, bits)
    width = 4 * bits
    for k in range(256):
        part, lane = divmod(k % 128, width)
        word = int(words[k // 128, lane]) & 0xFFFFFFFF
        assert word >> (part * bits) & (2**bits - 1) == int(codes[0, k])


SHAPES = [  # rows, outputs, inputs, bits, group size
    (1, 1, 1, 4, 0),
    (3, 33, 100, 4, 32),
    (17, 65, 300, 4, 64),
    (5, 40, 256, 4, 128),
    (2, 31, 520, 4, 256),
    (65, 130, 130, 4, 16),
    (1, 33, 40, 8, 0),
    (3, 50, 300, 8, 32),
    (20, 33, 257, 8, 128),
    (130, 30, 96, 8, 96),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "out", "depth", "bits", "group_size"), SHAPES)
def test_products(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    out: int,
    depth: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.dequant_gemm import dequant_linear

    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 product of matrices")
    parts, floats = weight(out, depth, bits, group_size, device)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth + 3, generator=generator).to(device, dtype)[:, :depth]
    bias = torch.randn(out, generator=generator).to(device, dtype) if rows % 2 else None
    weights = parts["words"], parts["scales"], parts["zeros"]
    y = dequant_linear(x, *weights, bias, bits=bits, group_size=group_size)
    expected = x.float() @ floats.to(dtype).float().T
    expected = (expected if bias is None else expected + bias.float()).to(dtype)
    assert_close(y, expected)
    fixed = dequant_linear(x, *weights, bias, bits=bits, group_size=group_size, fixed_tiles=True)
    assert_close(fixed, expected)
    again = reference.dequant_linear(x, *weights, bias, bits=bits, group_size=group_size)
    assert_close(again, expected)


@pytest.mark.parametrize("rows", [16, 40, 70])
def test_a_row_is_the_same_alone_and_among_others(device: torch.device, rows: int) -> None:
    """Bit for bit, while the tiles are of one height; a row of NaN stays by itself."""
    from tokenmill.kernels.dequant_gemm import dequant_linear

    parts, _ = weight(33, 200, 4, 32, device)
    x = torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows)).to(device)
    beside = x.flip(0)
    beside[0] = torch.nan
    together = dequant_linear(x, *parts.values(), bits=4, group_size=32)
    turned = dequant_linear(beside, *parts.values(), bits=4, group_size=32).flip(0)
    assert torch.equal(together[:-1], turned[:-1])


@pytest.mark.parametrize("bits", [4, 8])
def test_with_fixed_tiles_in_any_batch(device: torch.device, bits: int) -> None:
    """On a GPU beyond the rows of a tile too; interpreted, other heights are other products."""
    from tokenmill.kernels.dequant_gemm import dequant_linear

    parts, _ = weight(33, 200, bits, 32, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    most = 600 if device.type == "cuda" else 64
    x = torch.randn(most, 200, generator=torch.Generator().manual_seed(bits)).to(device, dtype)
    multiply = functools.partial(dequant_linear, bits=bits, group_size=32, fixed_tiles=True)
    whole = multiply(x, *parts.values())
    for count in (1, 2, 15, 16, 17, 64, 65, 128, 600):
        assert torch.equal(multiply(x[:count], *parts.values()), whole[:count])
        assert torch.equal(multiply(x[-count:], *parts.values()), whole[-count:])


def test_no_rows(device: torch.device) -> None:
    from tokenmill.kernels.dequant_gemm import dequant_linear

    parts, _ = weight(8, 32, 4, 32, device)
    y = dequant_linear(torch.empty(0, 32, device=device), *parts.values(), bits=4, group_size=32)
    assert y.shape == (0, 8)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    from tokenmill.kernels.dequant_gemm import dequant_linear

    parts, _ = weight(8, 64, 4, 32, device)
    x = torch.zeros(1, 64, device=device)
    for change, bits, group_size, message in (
        ({}, 3, 32, "bits: expected 4 or 8, got 3"),
        ({}, 8, 48, "group_size: expected 0 or a multiple of 32, got 48"),
        ({}, 4, 16, r"scales: expected shape \[4, 8\], got \[2, 8\]"),
        ({}, 8, 32, r"words: expected shape \[1, N, 32\], got \[1, 8, 16\]"),
        ({"zeros": parts["zeros"].int()}, 4, 32, "zeros: expected dtype torch.uint8"),
        ({"scales": parts["scales"].half()}, 4, 32, "scales: expected dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            dequant_linear(x, *(parts | change).values(), bits=bits, group_size=group_size)
