"""`Decoder`: the one ragged decoder that every supported family runs through.

A step goes in as a `RaggedBatch`; keys and values are written to the cache; the logits of the
wanted tokens come out. The language-model head is applied to those tokens alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import embedding, pad

from tokenmill.engine.batch import RaggedBatch
from tokenmill.engine.group import ALONE, Group
from tokenmill.engine.kv_cache import KVCache
from tokenmill.engine.models.norm import Norm
from tokenmill.engine.models.rope import rotary_table
from tokenmill.engine.models.shard import Shard
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.weights import LayerWeights, ModelWeights
from tokenmill.kernels import cpu_ops, ops

if TYPE_CHECKING:
    from tokenmill.engine.models.layer_program import LayerProgram


class Decoder:
    """What a model does is said by its spec and by the weights that it has, nowhere by its name.

    The residual of a layer is kept apart from what is to be added to it, so that the addition is
    done with the norms before and behind it.

    Where the model is divided among the ranks of a group, each of them computes a part of the sums
    that embedding, attention and MLP are, which `_summed` adds up; all else is computed by all.
    """

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, max_model_len: int, group: Group = ALONE
    ) -> None:
        self.spec = spec
        self._weights = weights
        self._group = group
        device, dtype = weights.embedding.device, weights.embedding.dtype
        tables = {rope: rotary_table(rope, max_model_len).to(device) for rope in set(spec.ropes)}
        self._cos_sin = [tables[rope] for rope in spec.ropes]
        self._program: tuple[KVCache, LayerProgram | None] | None = None
        # Rounded as the models were trained: they keep the scale in the dtype of the weights.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype).item()

    def forward(self, batch: RaggedBatch, cache: KVCache) -> torch.Tensor:
        """Compute one step; returns the last hidden states [L, H] of the wanted tokens."""
        program = self._program_for(cache)
        total: _Sum
        if program is not None:
            total = _Sum(*program.run(batch, self._embed(batch)))
        else:
            total = self._layers(batch, cache)
            if not _are_all_wanted(batch):
                total = total.rows(batch.logits_indices)
        hidden, _ = total.normed(self._weights.final_norm)
        return hidden

    def _layers(self, batch: RaggedBatch, cache: KVCache) -> "_Sum":
        """What the last layer adds, and its residual, [T, H]."""
        total = _Sum(None, self._embed(batch))
        attended: torch.Tensor | None = None
        if batch.is_padded:
            # Attention leaves padding as it is; what routes tokens must find numbers there.
            shape = (len(batch.input_ids), self.spec.num_heads, self.spec.head_dim)
            attended = total.residual.new_zeros(shape)
        for number, layer in enumerate(self._weights.layers):
            hidden, residual = total.normed(layer.attention_norm)
            added = self._attention(hidden, number, layer, batch, cache, attended)
            if self.spec.parallel:
                hidden = hidden if layer.mlp_norm is None else layer.mlp_norm(residual)
                added = self._summed(added + layer.mlp(hidden, batch.adapted))
                total = _Sum(added, residual)
            else:
                total = _Sum(self._summed(added), residual, layer.attention_post_norm)
                hidden, residual = total.normed(layer.mlp_norm)
                added = self._summed(layer.mlp(hidden, batch.adapted))
                total = _Sum(added, residual, layer.mlp_post_norm)
        return total

    def _program_for(self, cache: KVCache) -> "LayerProgram | None":
        if self._program is None or self._program[0] is not cache:
            self._program = (cache, self._new_program(cache))
        return self._program[1]

    def _new_program(self, cache: KVCache) -> "LayerProgram | None":
        """Where there is no program, layers are computed part by part."""
        layers = self._weights.layers
        if self._group.shard.size > 1 or not cpu_ops.has_programs(self._weights.embedding):
            return None
        from tokenmill.engine.models import layer_program

        if not layer_program.can_run(self.spec, layers, cache):
            return None
        return layer_program.LayerProgram(self.spec, layers, self._cos_sin, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] float32 of last hidden states [L, H]; whole on rank 0 alone."""
        return self.narrow_logits(hidden).float()

    def narrow_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same numbers, in 16 bits where the head gives no more."""
        logits = self._gathered(self._weights.lm_head(hidden))
        cap = self.spec.logit_softcap
        return logits if cap is None else ops.soft_cap(logits, cap)

    def _summed(self, partial: torch.Tensor) -> torch.Tensor:
        return self._group.sum(partial)

    def _gathered(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of the whole vocabulary from those of each rank's part of it."""
        size, vocabulary = self._group.shard.size, self.spec.vocab_size
        if size == 1:
            return logits
        width = -(-vocabulary // size)  # that of the largest part
        parts = self._group.gather(pad(logits, (0, width - logits.shape[1])))
        if not parts:
            return logits
        widths = [len(Shard(rank, size).part(vocabulary)) for rank in range(size)]
        return torch.cat([p[:, :w] for p, w in zip(parts, widths, strict=True)], dim=1)

    def _token_rows(self, ids: torch.Tensor) -> torch.Tensor:
        shard = self._group.shard
        if shard.size == 1:
            return self._table_rows(ids)
        part = shard.part(self.spec.vocab_size)
        ids = ids - part.start
        is_elsewhere = (ids < 0) | (ids >= len(part))
        rows = self._table_rows(ids.masked_fill(is_elsewhere, 0))
        return self._summed(rows.masked_fill_(is_elsewhere[:, None], 0.0))

    def _table_rows(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._weights.embedding
        if table.dim() == 2:
            return embedding(ids, table)
        height = table.shape[1]  # of a panel of the head
        return table[ids // height, ids % height]

    def _embed(self, batch: RaggedBatch) -> torch.Tensor:
        weights = self._weights
        rows = self._token_rows(batch.input_ids)
        if self._embedding_scale != 1.0:
            rows = rows * self._embedding_scale
        if weights.positions is not None:
            rows = rows + embedding(batch.positions, weights.positions)
        return rows

    def _attention(
        self,
        hidden: torch.Tensor,  # [T, H]
        number: int,
        layer: LayerWeights,
        batch: RaggedBatch,
        cache: KVCache,
        out: torch.Tensor | None,  # [T, Hq, D], used for every layer
    ) -> torch.Tensor:
        spec, keys, values = self.spec, cache.keys[number], cache.values[number]
        heads = layer.qkv(hidden, batch.adapted).view(hidden.shape[0], -1, spec.head_dim)
        q, k, v = heads.split_with_sizes(
            [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1
        )
        norms: dict[str, Any] = {}
        if layer.q_norm is not None and layer.k_norm is not None:
            if self._has_plain_head_norms(layer.q_norm):
                weights = layer.q_norm.weight, layer.k_norm.weight
                norms = {"q_norm": weights[0], "k_norm": weights[1], "eps": spec.norm_eps}
            else:
                q, k = self._norm_heads(q, k, layer.q_norm, layer.k_norm)
        cos_sin, slots = self._cos_sin[number], batch.slot_mapping
        q = ops.rope_store_kv(q, k, v, batch.positions, cos_sin, slots, keys, values, **norms)
        attended = ops.paged_attention(
            q,
            keys,
            values,
            cu_seqlens_q=batch.cu_seqlens_q,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            max_query_len=batch.max_query_len,
            scale=spec.attention_scale,
            window=spec.windows[number],
            softcap=spec.attention_softcap,
            out=out,
            fixed_tiles=self._weights.has_fixed_tiles,
        )
        return layer.attention_out(attended.view(hidden.shape[0], -1), batch.adapted)

    def _has_plain_head_norms(self, norm: Norm) -> bool:
        """Whether the norms of queries and keys are done with the rotation."""
        is_divided = self._group.shard.size > 1 and self.spec.qk_norm == "whole"
        return norm.bias is None and not is_divided

    def _norm_heads(
        self, q: torch.Tensor, k: torch.Tensor, q_norm: Norm, k_norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm queries and keys, [T, heads, D] each."""
        if self.spec.qk_norm != "whole":
            return _norm_rows(q, q_norm), _norm_rows(k, k_norm)
        # Over the heads of all ranks. A KV head that several have counts as often in both sums.
        rows = [heads.flatten(1) for heads in (q, k)]
        squares = torch.stack([row.float().square().sum(dim=-1) for row in rows])
        counts = torch.tensor([row.shape[1] for row in rows], device=q.device)
        sums = self._summed(torch.stack([squares, counts[:, None].expand_as(squares)]))
        q_mean, k_mean = sums[0] / sums[1]
        q_rows, k_rows = q_norm.scaled(rows[0], q_mean), k_norm.scaled(rows[1], k_mean)
        return q_rows.view(q.shape), k_rows.view(k.shape)


@dataclass(frozen=True, slots=True)
class _Sum:
    """A residual [T, H] and what is to be added to it, normed before that by `post`."""

    added: torch.Tensor | None
    residual: torch.Tensor
    post: Norm | None = None

    def rows(self, wanted: torch.Tensor) -> "_Sum":
        added = None if self.added is None else self.added[wanted]
        return _Sum(added, self.residual[wanted], self.post)

    def normed(self, norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed sum and the sum; where there is no norm, the sum twice."""
        if self.added is None:
            return self.residual if norm is None else norm(self.residual), self.residual
        if norm is not None:
            return norm.add(self.added, self.residual, self.post)
        if self.post is not None:
            return self.post.add_normed(self.added, self.residual)
        total = self.added + self.residual
        return total, total


def _are_all_wanted(batch: RaggedBatch) -> bool:
    """Whether the wanted tokens are those of the batch, in their order, as far as is known."""
    return batch.is_padded and batch.max_query_len == 1


def _norm_rows(heads: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Norm each head of [T, heads, D]."""
    return norm(heads.reshape(-1, heads.shape[-1])).view(heads.shape)
