"""What adapters add to a linear, compiled: against plain products, and the bits of rows."""

from collections.abc import Iterator

import pytest
import torch

from tokenmill.kernels import compiler, cpu_ops

pytestmark = pytest.mark.skipif(
    not compiler.has_wide_vectors(), reason="this processor has no AVX-512"
)
#: Contiguous, equally far apart, neither, and few.
ROWS = [list(range(3, 41)), list(range(1, 60, 4)), [0, 1, 5, 7, 8, 20, 21, 50, 63], [7], [9, 2]]


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def tensors(ranks: int, depth: int = 50, width: int = 192) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(ranks)
    shapes = [(64, depth), (64, width), (ranks, depth), (width, ranks)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("ranks", [1, 3, 16, 32, 33, 100])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_the_sums(ranks: int, rows: list[int]) -> None:
    x, y, down, up = tensors(ranks)
    places, before = torch.tensor(rows), y.clone()
    cpu_ops.add_low_rank(y, x, places, cpu_ops.pack_low_rank(down, up))
    expected = before.double()
    expected[places] += x[places].double() @ down.double().T @ up.double().T
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    others = torch.tensor([row for row in range(64) if row not in rows])
    assert torch.equal(y[others], before[others])


@pytest.mark.parametrize("ranks", [5, 48])
def test_a_row_has_the_same_bits_whatever_is_beside_it(ranks: int) -> None:
    x, before, down, up = tensors(ranks)
    panels = cpu_ops.pack_low_rank(down, up)
    alone = before.clone()
    for row in range(64):
        cpu_ops.add_low_rank(alone, x, torch.tensor([row]), panels)
    for rows in [*ROWS, list(range(64))]:
        y = before.clone()
        cpu_ops.add_low_rank(y, x, torch.tensor(rows), panels)
        assert torch.equal(y[rows], alone[rows])


def test_rows_of_a_wider_tensor() -> None:
    """Strides are those of the rows."""
    x, before, down, up = tensors(8)
    panels, places = cpu_ops.pack_low_rank(down, up), torch.tensor([4, 9, 10])
    wide_x, wide_y = torch.zeros(64, 80), torch.zeros(64, 256)
    wide_x[:, :50], wide_y[:, :192] = x, before
    expected = before.clone()
    cpu_ops.add_low_rank(expected, x, places, panels)
    cpu_ops.add_low_rank(wide_y[:, :192], wide_x[:, :50], places, panels)
    assert torch.equal(wide_y[:, :192], expected)
    assert not wide_y[:, 192:].any()
