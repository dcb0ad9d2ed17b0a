from collections.abc import Callable

import pytest
import torch

from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.mlp import MLP, MoE
from tokenmill.kernels import reference

Compare = Callable[[torch.Tensor, torch.Tensor], None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 2), (60, 4), (7, 7)])
def test_routes_to_the_best(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    experts: int,
    top_k: int,
    normalize: bool,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.moe import route

    generator = torch.Generator().manual_seed(experts)
    # No two of a row are equal, in any of the types.
    ranks = torch.stack([torch.randperm(experts, generator=generator) for _ in range(9)])
    logits = (ranks / 16).to(device, dtype)
    shares, chosen = route(logits, top_k, normalize=normalize)
    expected = reference.route(logits, top_k, normalize=normalize)
    assert_close(shares, expected[0])
    assert chosen.tolist() == expected[1].tolist()


def test_equal_logits_go_to_the_lowest_numbers(device: torch.device) -> None:
    from tokenmill.kernels.moe import route

    shares, chosen = route(torch.zeros(2, 6, device=device), 3, normalize=False)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert shares.flatten().tolist() == pytest.approx([1 / 6] * 6)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rows_that_are_not_numbers_go_to_experts_that_exist(device: torch.device) -> None:
    """Padding rows of a step may hold anything."""
    from tokenmill.kernels.moe import route

    _, chosen = route(torch.full((2, 5), torch.nan, device=device), 2, normalize=True)
    assert 0 <= int(chosen.min()) <= int(chosen.max()) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width", "depth"), [(1, 1, 1), (7, 63, 40), (40, 33, 65)])
def test_grouped_products(
    device: torch.device,
    assert_close: Compare,
    poisoned: None,
    tokens: int,
    width: int,
    depth: int,
    dtype: torch.dtype,
) -> None:
    from tokenmill.kernels.expert_order import sort_by_expert
    from tokenmill.kernels.moe import grouped_linear

    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 product of matrices")
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, depth, generator=generator).to(device, dtype)
    weight = torch.randn(5, width, depth, generator=generator).mul(depth**-0.5).to(device, dtype)
    # Expert 1 gets nobody, expert 4 most: more than a tile of them.
    chosen = torch.tensor([0, 2, 3, 4, 4, 4, 4])[
        torch.randint(7, (tokens, 3), generator=generator)
    ].to(device, torch.int32)
    y = grouped_linear(x, weight, *sort_by_expert(chosen, 5))
    assert_close(y, reference.grouped_linear(x, weight, chosen))


@pytest.mark.parametrize("tokens", [1, 6, 150])
@pytest.mark.parametrize("shared", [False, True])
def test_experts_at_once_are_those_one_by_one(
    device: torch.device, assert_close: Compare, poisoned: None, tokens: int, shared: bool
) -> None:
    layers = []
    for is_stacked in (False, True):
        generator = torch.Generator().manual_seed(tokens)

        def weights(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).mul(shape[-1] ** -0.5).to(device)

        stacks = weights(6, 40, 24), weights(6, 24, 20)
        experts = [
            MLP(Linear(up), Linear(down), "silu", gated=True)
            for up, down in zip(*stacks, strict=True)
        ]
        layers.append(
            MoE(
                Linear(weights(6, 24)),
                experts,
                top_k=2,
                normalize=not shared,
                shared=experts[3] if shared else None,
                shared_gate=Linear(weights(1, 24)) if shared else None,
                stacks=stacks if is_stacked else None,
            )
        )
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0)).to(device)
    one_by_one, at_once = (layer(x) for layer in layers)
    assert_close(at_once, one_by_one)


def test_a_row_is_the_same_alone_and_among_others(device: torch.device) -> None:
    """Bit for bit, while the tiles are of one height."""
    from tokenmill.kernels.expert_order import sort_by_expert
    from tokenmill.kernels.moe import grouped_linear

    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.randn(2, 33, 40, generator=torch.Generator().manual_seed(1)).to(device)
    chosen = (torch.arange(30, device=device, dtype=torch.int32) % 2)[:, None].contiguous()
    together = grouped_linear(x, weight, *sort_by_expert(chosen, 2))
    alone = grouped_linear(x[5:6], weight, *sort_by_expert(chosen[5:6], 2))
    assert torch.equal(together[5:6], alone)


@pytest.mark.parametrize("tokens", [1, 5, 16, 120])
def test_with_fixed_tiles_in_any_batch(device: torch.device, tokens: int) -> None:
    """Bit for bit: few rows and many for each expert would have tiles of two heights."""
    from tokenmill.kernels.expert_order import sort_by_expert
    from tokenmill.kernels.moe import grouped_linear

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(120, 72, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    w = torch.randn(3, 33, 72, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    chosen = (torch.arange(120, device=device, dtype=torch.int32) % 3)[:, None].contiguous()
    whole = grouped_linear(x, w, *sort_by_expert(chosen, 3), fixed_tiles=True)
    few = sort_by_expert(chosen[:tokens], 3)
    assert torch.equal(grouped_linear(x[:tokens], w, *few, fixed_tiles=True), whole[:tokens])


def test_more_choices_than_experts_are_refused(device: torch.device) -> None:
    from tokenmill.kernels.moe import route

    with pytest.raises(ValueError, match=r"^top_k: expected 1 to the 3 experts, got 4"):
        route(torch.zeros(1, 3, device=device), 4, normalize=True)
