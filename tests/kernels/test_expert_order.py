import pytest
import torch


def test_order_and_ends(device: torch.device) -> None:
    from tokenmill.kernels.expert_order import sort_by_expert

    chosen = torch.tensor([[3, 1], [1, 0], [3, 1]], dtype=torch.int32, device=device)
    order, ends = sort_by_expert(chosen, 5)
    assert order.tolist() == [3, 1, 2, 5, 0, 4]
    assert ends.tolist() == [1, 4, 4, 6, 6]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (1100, 2, 7), (512, 4, 60)])
def test_a_stable_sort(device: torch.device, tokens: int, top_k: int, experts: int) -> None:
    """Of more assignments than a program takes at a time, and of just as many."""
    from tokenmill.kernels.expert_order import sort_by_expert

    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randint(0, experts, (tokens, top_k), generator=generator).int().to(device)
    order, ends = sort_by_expert(chosen, experts)
    expected, places = chosen.flatten().sort(stable=True)
    assert torch.equal(order, places.int())
    counts = torch.bincount(expected, minlength=experts)
    assert torch.equal(ends.long(), counts.cumsum(0))


def test_no_assignments(device: torch.device) -> None:
    from tokenmill.kernels.expert_order import sort_by_expert

    order, ends = sort_by_expert(torch.empty(0, 2, dtype=torch.int32, device=device), 3)
    assert (order.tolist(), ends.tolist()) == ([], [0, 0, 0])


def test_another_type_is_named(device: torch.device) -> None:
    from tokenmill.kernels.expert_order import sort_by_expert

    with pytest.raises(ValueError, match=r"^chosen: expected dtype torch.int32, got torch.int64"):
        sort_by_expert(torch.zeros(1, 2, dtype=torch.int64, device=device), 3)
