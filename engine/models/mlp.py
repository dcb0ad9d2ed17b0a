"""`MLP`, and `MoE`, the mixture of experts that stands in its place."""

from collections.abc import Iterator
from functools import partial

import torch

from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.low_rank import Adapted
from tokenmill.kernels import ops


class MLP:
    """down(activation(up(x))); gated: `up` gives gate and up side by side, [T, 2I]."""

    def __init__(self, up: Linear, down: Linear, activation: str, *, gated: bool) -> None:
        self.up = up
        self.down = down
        self.gated = gated
        self.activation = activation

    def __call__(self, x: torch.Tensor, adapted: Adapted = ()) -> torch.Tensor:
        inner = self.up(x, adapted)
        activate = ops.gated_activation if self.gated else ops.activation
        return self.down(activate(inner, self.activation), adapted)

    def linears(self) -> Iterator[Linear]:
        """All linears in it."""
        yield from (self.up, self.down)


class MoE:
    """Each token goes through `top_k` of the experts, and through the shared one if there is one.

    No adapter changes an expert, but the shared one.

    The experts run one after another on the tokens routed to them; a token's sum is in the order
    of the experts, whatever else is in the batch. Where their weights are `stacks` of up and down,
    [E, 2I, H] and [E, H, I], on a GPU, kernels compute all of them at once, and nothing is read
    back to the host.
    """

    def __init__(
        self,
        router: Linear,
        experts: list[MLP],
        *,
        top_k: int,
        normalize: bool,
        shared: MLP | None,
        shared_gate: Linear | None,
        stacks: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.router = router
        self.experts = experts
        self.stacks = stacks
        self.shared = shared
        self.shared_gate = shared_gate
        #: On a GPU a row has the same bits in any batch.
        self.has_fixed_tiles = False
        self._top_k = top_k
        self._normalize = normalize

    def __call__(self, x: torch.Tensor, adapted: Adapted = ()) -> torch.Tensor:
        common = gate = None
        if self.shared is not None and self.shared_gate is not None:
            common, gate = self.shared(x, adapted), self.shared_gate(x)
        if self.stacks is not None:
            return self._at_once(x, *self.stacks, common, gate)
        out = self._one_by_one(x)
        if common is not None and gate is not None:
            # Torch's own sigmoid rounds a tensor's last few elements differently.
            out += torch.exp(-gate).add_(1).reciprocal_() * common
        return out

    def _one_by_one(self, x: torch.Tensor) -> torch.Tensor:
        shares, chosen = self.router(x).float().softmax(dim=-1).topk(self._top_k, dim=-1)  # [T, k]
        if self._normalize:
            shares /= shares.sum(dim=-1, keepdim=True)
        shares = shares.to(x.dtype)
        out = torch.zeros_like(x)
        for number in sorted(set(chosen.flatten().tolist())):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            share = shares[rows, places].unsqueeze(1)
            out.index_add_(0, rows, self.experts[number](x[rows]) * share)
        return out

    def _at_once(
        self,
        x: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        common: torch.Tensor | None,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        from tokenmill.kernels import expert_order, moe

        shares, chosen = moe.route(self.router(x), self._top_k, normalize=self._normalize)
        order, ends = expert_order.sort_by_expert(chosen, len(self.experts))
        multiply = partial(moe.grouped_linear, fixed_tiles=self.has_fixed_tiles)
        inner = multiply(x, up, order, ends)
        inner = ops.gated_activation(inner, self.experts[0].activation)
        return moe.sum_experts(multiply(inner, down, order, ends), shares, common, gate)

    def linears(self) -> Iterator[Linear]:
        """All linears in it."""
        yield self.router
        for expert in self.experts:
            yield from expert.linears()
        if self.shared is not None and self.shared_gate is not None:
            yield from (*self.shared.linears(), self.shared_gate)
