from collections.abc import Callable

import pytest
import torch

Compare = Callable[[torch.Tensor, torch.Tensor], None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 97), (2, 4096), (2, 9001)])
def test_is_that_of_torch(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    """Of rows that are parts of longer ones, with tokens that cannot be had, and large ones."""
    from tokenmill.kernels.logsumexp import logsumexp

    x = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(width)) * 30
    x[:, 1:width:7] = float("-inf")
    x = x.to(device, dtype)[:, :width]
    assert_close(logsumexp(x), x.float().logsumexp(dim=-1))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_is_the_same_alone_and_among_others(device: torch.device) -> None:
    from tokenmill.kernels.logsumexp import logsumexp

    x = torch.randn(9, 5000, generator=torch.Generator().manual_seed(0)).to(device)
    x[3, 7] = torch.nan
    whole = logsumexp(x)
    for row in (0, 1, 8):
        assert torch.equal(logsumexp(x[row : row + 1]), whole[row : row + 1])


def test_no_rows(device: torch.device) -> None:
    from tokenmill.kernels.logsumexp import logsumexp

    assert logsumexp(torch.empty(0, 7, device=device)).shape == (0,)
