import pytest
import torch

from tokenmill.kernels import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 100), (2, 2049)])
def test_soft_cap(
    device: torch.device, poisoned: None, rows: int, width: int, dtype: torch.dtype
) -> None:
    from tokenmill.kernels.soft_cap import soft_cap

    x = (40 * torch.randn(rows, 2 * width, device=device)).to(dtype)[:, :width]
    expected = ops.soft_cap(x.cpu().clone(), 30.0)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(soft_cap(x, 30.0).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_no_rows_and_large_logits(device: torch.device) -> None:
    from tokenmill.kernels.soft_cap import soft_cap

    assert soft_cap(torch.zeros(0, 7, device=device), 30.0).shape == (0, 7)
    x = torch.tensor([[1e30, -1e30, float("nan")]], device=device)
    high, low, none = soft_cap(x, 30.0)[0].tolist()
    assert (high, low) == (30.0, -30.0)
    assert none != none
