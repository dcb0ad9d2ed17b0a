from collections.abc import Callable

import pytest
import torch

from tokenmill.kernels import reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 63), (3, 100), (2, 1536)])
def test_matches_the_reference(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    rows: int,
    width: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.gated_activation import gated_activation

    gate_up = (4 * torch.randn(rows, 2 * width, device=device)).to(dtype)
    assert_close(gated_activation(gate_up, kind), reference.gated_activation(gate_up, kind))


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_without_a_gate(
    device: torch.device, assert_close: Compare, poisoned: None, kind: str
) -> None:
    from tokenmill.kernels.gated_activation import activation

    x = 4 * torch.randn(3, 200, device=device)[:, 50:150]
    assert_close(activation(x, kind), reference.ACTIVATIONS[kind](x))


def test_large_gates_neither_overflow_nor_vanish(device: torch.device) -> None:
    from tokenmill.kernels.gated_activation import gated_activation

    gate_up = torch.tensor([[-80.0, 80.0, 3.0, 3.0]], device=device)
    closed, opened = gated_activation(gate_up, "silu")[0].tolist()
    assert closed == pytest.approx(0.0, abs=1e-30)
    assert opened == 240.0


def test_an_odd_width_is_named(device: torch.device) -> None:
    from tokenmill.kernels.gated_activation import gated_activation

    with pytest.raises(ValueError, match=r"^the width of gate_up: expected a multiple of .* got 5"):
        gated_activation(torch.zeros(2, 5, device=device), "silu")
