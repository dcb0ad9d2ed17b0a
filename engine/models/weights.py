"""`ModelWeights`: the weights of a model as the decoder computes with them.

They are allocated fused (qkv, gate-up), filled in place from a checkpoint, then packed one by one,
in place where they can be: at no time is more than one linear in memory twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tokenmill.engine.errors import OutOfMemory
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.mlp import MLP, MoE
from tokenmill.engine.models.norm import Norm
from tokenmill.engine.models.quantization import Packing, Scheme
from tokenmill.engine.models.shard import WHOLE, Shard
from tokenmill.engine.models.spec import ModelSpec, MoESpec


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; a norm that the model lacks is None."""

    attention_norm: Norm | None
    qkv: Linear  # [H] -> [(Hq + 2 Hkv) * D]
    q_norm: Norm | None
    k_norm: Norm | None
    attention_out: Linear  # [Hq * D] -> [H]
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: MLP | MoE
    mlp_post_norm: Norm | None

    def norms(self) -> dict[str, Norm]:
        """The norms that there are, by name."""
        named = {
            name: getattr(self, name)
            for name in (
                "attention_norm",
                "q_norm",
                "k_norm",
                "attention_post_norm",
                "mlp_norm",
                "mlp_post_norm",
            )
        }
        return {name: norm for name, norm in named.items() if norm is not None}


@dataclass(slots=True)
class ModelWeights:
    """All weights of a shard; the head's weight is the embedding itself where they are tied.

    Packed, a tied embedding is a view of the panels of the head.
    """

    #: [V, H], V being the shard's part of the vocabulary; or [V / 64, 64, H], not contiguous.
    embedding: torch.Tensor
    positions: torch.Tensor | None  # [P, H]
    layers: list[LayerWeights]
    final_norm: Norm
    lm_head: Linear  # [H] -> [V]
    #: On a GPU a row of a step has the same bits in any batch; `fix_tiles` sets it.
    has_fixed_tiles: bool = False

    def fix_tiles(self, *, is_fixed: bool = True) -> None:
        """Compute by kernels whose rows do not depend on each other, or by the fastest again."""
        self.has_fixed_tiles = is_fixed
        for linear in self.linears():
            linear.fix_tiles(is_fixed=is_fixed)
        for layer in self.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.has_fixed_tiles = is_fixed

    def linears(self) -> Iterator[Linear]:
        """Every linear of the model."""
        for layer in self.layers:
            yield from (layer.qkv, layer.attention_out, *layer.mlp.linears())
        yield self.lm_head

    @property
    def nbytes(self) -> int:
        """Memory of all of them; a tied head counts where it is kept a second time."""
        tables = [self.embedding, *([] if self.positions is None else [self.positions])]
        norms = [part for norm in self.norms() for part in (norm.weight, norm.bias)]
        plain = sum(part.nbytes for part in (*tables, *norms) if part is not None)
        is_shared = self.lm_head.weight is self.embedding or self.embedding.dim() == 3
        linears = sum(linear.nbytes for linear in self.linears())
        return plain + linears - (self.embedding.nbytes if is_shared else 0)

    def norms(self) -> Iterator[Norm]:
        """Every norm of the model."""
        for layer in self.layers:
            yield from layer.norms().values()
        yield self.final_norm


def empty_weights(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
    packing: Packing | None = None,
) -> ModelWeights:
    """Allocate the fused tensors, uninitialised; `spec` is that of the shard.

    `packing`: how the linears of layers are kept, all but those that choose experts.

    Raises:
        OutOfMemory: the device has no room for them.
    """
    try:
        return _Allocation(spec, dtype, device, shard, packing).weights()
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, the plain class on a CPU
        raise OutOfMemory(f"the weights do not fit {device}: {error}") from error


def pack(weights: ModelWeights, scheme: Scheme | None = None) -> ModelWeights:
    """Lay out every linear for its device, in place; returns `weights`."""
    is_tied = weights.lm_head.weight is weights.embedding
    for linear in weights.linears():
        is_left_out = linear is weights.lm_head and scheme is not None and not scheme.has_head
        linear.pack(None if is_left_out else scheme)
    if is_tied and weights.lm_head.layout == "panels":
        weights.embedding = weights.lm_head.weight.transpose(1, 2)  # so it is kept once
    for layer in weights.layers:
        if scheme is not None and isinstance(layer.mlp, MoE):
            layer.mlp.stacks = None  # the experts are elsewhere now
    return weights


def random_weights(weights: ModelWeights, seed: int) -> None:
    """Fill with seeded noise of a trained model's size: for benches where no weights can be had."""
    generator = torch.Generator(device=weights.embedding.device).manual_seed(seed)
    weights.embedding.normal_(0.0, 1.0, generator=generator)
    if weights.positions is not None:
        weights.positions.normal_(0.0, 0.1, generator=generator)
    for linear in weights.linears():
        if linear.weight is not weights.embedding:
            linear.weight.normal_(0.0, linear.weight.shape[1] ** -0.5, generator=generator)
        if linear.bias is not None:
            linear.bias.zero_()
    for norm in weights.norms():
        norm.weight.fill_(1.0)
        if norm.bias is not None:
            norm.bias.zero_()


@dataclass(frozen=True, slots=True)
class _Allocation:
    """The shapes of a model, as empty tensors."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    shard: Shard
    packing: Packing | None

    def weights(self) -> ModelWeights:
        spec = self.spec
        rows = len(self.shard.part(spec.vocab_size))
        embedding = self._new(rows, spec.hidden_size)
        positions = None
        if spec.position_offset is not None:
            positions = self._new(spec.max_position, spec.hidden_size)
        head = embedding if spec.tied_embeddings else self._new(rows, spec.hidden_size)
        return ModelWeights(
            embedding=embedding,
            positions=positions,
            layers=[self._layer(number) for number in range(spec.num_layers)],
            final_norm=self._norm(spec.hidden_size),
            lm_head=Linear(head, self._new(rows) if spec.head_bias else None, row_bits=16),
        )

    def _layer(self, number: int) -> LayerWeights:
        spec, hidden = self.spec, self.spec.hidden_size
        pre = self._norm(hidden) if spec.pre_norm else None
        has_mlp_norm = spec.pre_norm and not spec.shared_norm
        q_width, k_width = spec.q_size, spec.kv_size
        if spec.qk_norm == "head":
            q_width = k_width = spec.head_dim
        return LayerWeights(
            attention_norm=pre,
            qkv=self._linear(
                hidden, spec.q_size + 2 * spec.kv_size, bias=spec.qkv_bias, row_bits=16
            ),
            q_norm=self._norm(q_width) if spec.qk_norm else None,
            k_norm=self._norm(k_width) if spec.qk_norm else None,
            attention_out=self._summed(spec.q_size, hidden, bias=spec.out_bias, row_bits=16),
            attention_post_norm=self._norm(hidden) if spec.post_norm else None,
            mlp_norm=self._norm(hidden) if has_mlp_norm else None,
            mlp=(
                self._moe(spec.moe)
                if spec.moe and spec.moe.layers[number]
                else self._mlp(spec.intermediate_size)
            ),
            mlp_post_norm=self._norm(hidden) if spec.post_norm else None,
        )

    def _mlp(self, inner: int) -> MLP:
        spec, hidden = self.spec, self.spec.hidden_size
        up = self._linear(hidden, 2 * inner if spec.gated else inner, bias=spec.mlp_bias)
        down = self._summed(inner, hidden, bias=spec.mlp_bias)
        return MLP(up, down, spec.activation, gated=spec.gated)

    def _moe(self, moe: MoESpec) -> MoE:
        spec, hidden, inner = self.spec, self.spec.hidden_size, moe.intermediate_size
        shared = moe.shared_intermediate_size
        experts, stacks = None, None
        # On a CPU, and of a packed checkpoint, each expert has memory of its own.
        is_stacked = self.device.type != "cpu" and self.packing is None
        if is_stacked and spec.gated and not spec.mlp_bias:
            stacks = (
                self._new(moe.num_experts, 2 * inner, hidden),
                self._new(moe.num_experts, hidden, inner),
            )
            experts = [
                MLP(Linear(up), Linear(down), spec.activation, gated=True)
                for up, down in zip(*stacks, strict=True)
            ]
        return MoE(
            Linear(self._new(moe.num_experts, hidden), row_bits=32),
            experts or [self._mlp(inner) for _ in range(moe.num_experts)],
            top_k=moe.top_k,
            normalize=moe.normalize,
            shared=self._mlp(shared) if shared else None,
            shared_gate=Linear(self._new(1, hidden), row_bits=32) if shared else None,
            stacks=stacks,
        )

    def _linear(self, width: int, out: int, *, bias: bool, row_bits: int = 8) -> Linear:
        added = self._new(out) if bias else None
        if self.packing is None:
            return Linear(self._new(out, width), added, row_bits=row_bits)
        shape = torch.empty(out, width, dtype=self.dtype, device="meta")
        parts = self.packing.empty(out, width, self.device)
        return Linear(shape, added, packing=self.packing, parts=parts)

    def _summed(self, width: int, out: int, *, bias: bool, row_bits: int = 8) -> Linear:
        """A linear whose outputs on all ranks are added up."""
        return self._linear(width, out, bias=bias and self.shard.rank == 0, row_bits=row_bits)

    def _norm(self, width: int) -> Norm:
        new = partial(torch.empty, width, dtype=torch.float32, device=self.device)
        return Norm(new(), new() if self.spec.layer_norm else None, self.spec.norm_eps)

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
