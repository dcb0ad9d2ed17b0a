"""`Decoder`: the one ragged decoder that every supported family runs through.

A step goes in as a `RaggedBatch`; keys and values are written to the cache; the logits of the
wanted tokens come out. The language-model head is applied to those tokens alone.
"""

import torch
from torch.nn.functional import embedding

from tokenmill.engine.batch import RaggedBatch
from tokenmill.engine.kv_cache import KVCache
from tokenmill.engine.models.packed import PackedLayer, PackedWeights
from tokenmill.engine.models.spec import ModelSpec, inverse_frequencies
from tokenmill.kernels import ops


class Decoder:
    """Llama-shaped: RMSNorm, rotary positions, grouped-query attention, gated SiLU."""

    def __init__(self, spec: ModelSpec, weights: PackedWeights, max_model_len: int) -> None:
        self.spec = spec
        self._weights = weights
        self._scale = spec.head_dim**-0.5
        self._cos_sin = rotary_table(spec, max_model_len).to(weights.embedding.device)

    def forward(self, batch: RaggedBatch, cache: KVCache) -> torch.Tensor:
        """Compute one step; returns the last hidden states [L, H] of the wanted tokens."""
        weights, eps = self._weights, self.spec.norm_eps
        residual = embedding(batch.input_ids, weights.embedding)  # [T, H]
        hidden = ops.rms_norm(residual, weights.layers[0].attention_norm, eps)
        for number, layer in enumerate(weights.layers):
            if number:
                hidden, residual = ops.add_rms_norm(hidden, residual, layer.attention_norm, eps)
            hidden = self._attention(hidden, layer, batch, cache.keys[number], cache.values[number])
            hidden, residual = ops.add_rms_norm(hidden, residual, layer.mlp_norm, eps)
            hidden = layer.down(ops.gated_activation(layer.gate_up(hidden), "silu"))
        wanted = batch.logits_indices
        hidden, _ = ops.add_rms_norm(hidden[wanted], residual[wanted], weights.final_norm, eps)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] float32 of last hidden states [L, H]."""
        return self._weights.lm_head(hidden).float()

    def _attention(
        self,
        hidden: torch.Tensor,  # [T, H]
        layer: PackedLayer,
        batch: RaggedBatch,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        spec = self.spec
        heads = layer.qkv(hidden).view(hidden.shape[0], -1, spec.head_dim)
        q, k, v = heads.split_with_sizes(
            [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1
        )
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._head_norm(q, layer.q_norm), self._head_norm(k, layer.k_norm)
        ops.rope_store_kv(q, k, v, batch.positions, self._cos_sin, batch.slot_mapping, keys, values)
        attended = ops.paged_attention(
            q,
            keys,
            values,
            cu_seqlens_q=batch.cu_seqlens_q,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            max_query_len=batch.max_query_len,
            scale=self._scale,
        )
        return layer.attention_out(attended.view(hidden.shape[0], -1))

    def _head_norm(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        flat = heads.reshape(-1, self.spec.head_dim)
        return ops.rms_norm(flat, weight, self.spec.norm_eps).view(heads.shape)


def rotary_table(spec: ModelSpec, max_model_len: int) -> torch.Tensor:
    """Cosines and sines of every position: [max_model_len, head_dim] float32, cosines first."""
    frequencies = torch.tensor(inverse_frequencies(spec), dtype=torch.float64)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float64), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()
