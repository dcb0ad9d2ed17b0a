from collections.abc import Callable

import pytest
import torch

Compare = Callable[[torch.Tensor, torch.Tensor], None]
Linear = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Outputs and inputs of Qwen3-0.6B (the head shortened) and of Llama-3.1-8B, a router and a gate.
REAL = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (20000, 1024), (6144, 4096)]
REAL += [(4096, 4096), (28672, 4096), (4096, 14336), (8, 4096), (1, 2048), (16, 4096), (4096, 16)]


def linear_of(
    rows: int,
    out: int,
    depth: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    beside: int = 3,
) -> Linear:
    """x, whose rows are parts of longer ones, w and bias."""
    generator = torch.Generator(device).manual_seed(rows + out + depth)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, w = random(rows, depth + beside), random(out, depth) * depth**-0.5
    return x.to(dtype)[:, :depth], w.to(dtype), random(out).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "out", "depth"),
    [(1, 1, 1), (3, 33, 100), (65, 70, 64), (70, 140, 130), (64, 40, 192), (600, 17, 16)],
)
def test_products(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    out: int,
    depth: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.fixed_linear import fixed_linear

    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 product of matrices")
    x, w, bias = linear_of(rows, out, depth, device, dtype)
    plain = x.float() @ w.float().T
    assert_close(fixed_linear(x, w, bias), (plain + bias.float()).to(dtype))
    assert_close(fixed_linear(x, w), plain.to(dtype))


@pytest.mark.parametrize("number", range(6))
def test_every_tile(device: torch.device, assert_close: Compare, number: int) -> None:
    """Whatever would choose it; more tiles below each other than a band has."""
    from tokenmill.kernels import fixed_linear as module

    known = module.tiles(is_large=device.type == "cpu" or module.is_large(device))
    if number >= len(known):
        pytest.skip("the device has not the memory for all of them")
    _, tile = known[number]
    x, w, bias = linear_of(9 * tile.rows + 5, tile.outputs + 9, 70, device, torch.float16)
    expected = (x.float() @ w.float().T + bias.float()).half()
    assert_close(module.fixed_linear(x, w, bias, tile=tile), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_is_the_same_alone_and_among_others(device: torch.device, dtype: torch.dtype) -> None:
    """Bit for bit, wherever it stands; in 16 bits interpreted tiles are numpy's, so of one size."""
    from tokenmill.kernels.fixed_linear import fixed_linear

    most = 150 if dtype == torch.float32 or device.type == "cuda" else 64
    x, w, bias = linear_of(most, 33, 200, device, dtype)
    whole = fixed_linear(x, w, bias)
    for count in (1, 2, 7, 63, 64, 65, 129, 150):
        assert torch.equal(fixed_linear(x[:count], w, bias), whole[:count])
        assert torch.equal(fixed_linear(x[-count:], w, bias), whole[-count:])
    beside = x.clone()
    beside[1:] = torch.nan
    assert torch.equal(fixed_linear(beside, w, bias)[0], whole[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("out", "depth"), REAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_number_of_rows_of_real_shapes(
    device: torch.device, out: int, depth: int, dtype: torch.dtype
) -> None:
    """All that a step may have, so all tiles; the last rows too, which stand elsewhere in them."""
    from tokenmill.kernels.fixed_linear import fixed_linear

    if device.type == "cpu":
        pytest.skip("too large for the interpreter")
    x, w, bias = linear_of(4096, out, depth, device, dtype, beside=16)
    whole = fixed_linear(x, w, bias)
    for count in (*range(1, 514), 1000, 1024, 2047, 2048, 3000):
        differ = (fixed_linear(x[:count], w, bias) != whole[:count]).any(dim=1).sum()
        differ += (fixed_linear(x[-count:], w, bias) != whole[-count:]).any(dim=1).sum()
        assert not differ, f"{int(differ)} rows of {count} have other bits"


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [64, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_tiles_have_the_same_bits(device: torch.device, depth: int, dtype: torch.dtype) -> None:
    from tokenmill.kernels import fixed_linear as module

    if device.type == "cpu":
        pytest.skip("numpy's products depend on the tile")
    x, w, bias = linear_of(300, 700, depth, device, dtype)
    expected = module.fixed_linear(x, w, bias)
    for _, tile in module.tiles(is_large=module.is_large(device)):
        assert torch.equal(module.fixed_linear(x, w, bias, tile=tile), expected), tile


@pytest.mark.parametrize(
    ("rows", "outputs", "expected"),
    [  # of Llama-3.1-8B and Qwen3-0.6B
        (1, 28672, (64, 128)),
        (64, 6144, (64, 64)),
        (1, 1024, (64, 16)),
        (65, 1024, (64, 32)),
        (128, 4096, (64, 128)),
        (256, 4096, (128, 128)),
        (512, 6144, (128, 256)),
        (2048, 1024, (128, 128)),
        (64, 151936, (64, 128)),
        (65, 151936, (128, 256)),
    ],
)
def test_tiles_leave_programs_enough(rows: int, outputs: int, expected: tuple[int, int]) -> None:
    from tokenmill.kernels.fixed_linear import choose_tile

    tile = choose_tile(rows, outputs, torch.bfloat16, is_large=True)
    assert (tile.rows, tile.outputs) == expected
    assert choose_tile(rows, outputs, torch.float32, is_large=True).rows == 64


def test_tiles_of_devices_with_less_memory() -> None:
    from tokenmill.kernels.fixed_linear import choose_tile, tiles

    assert choose_tile(4096, 151936, torch.bfloat16, is_large=False)[:2] == (128, 128)
    for is_large, most in ((True, 192), (False, 96)):
        for _, tile in tiles(is_large=is_large):
            assert (tile.rows + tile.outputs) * tile.inputs * 2 * tile.stages <= most * 1024


def test_no_rows(device: torch.device) -> None:
    from tokenmill.kernels.fixed_linear import fixed_linear

    x, w, _ = linear_of(0, 5, 16, device)
    assert fixed_linear(x, w).shape == (0, 5)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    from tokenmill.kernels.fixed_linear import fixed_linear

    x, w, bias = linear_of(2, 8, 16, device)
    for arguments, message in (
        ((x[:, :9], w), r"^w: expected shape \[N, 9\], got \[8, 16\]"),
        ((x, w.half()), "^w: expected dtype torch.float32, got torch.float16"),
        ((x, torch.cat([w, w], dim=1)[:, :16]), "^w: expected a contiguous tensor"),
        ((x, w, bias[:5]), r"^bias: expected shape \[8\], got \[5\]"),
        ((x.T.contiguous().T, w), "^x: expected a last stride of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fixed_linear(*arguments)
