"""`paged_attention` for the CPU: few large calls of torch's attention instead of many small ones.

Decoding rows are ordered by context length and taken in groups whose keys and values fit the
processor's cache: each group gathers its blocks into one padded copy, which is still cached when
attention reads it. The query heads that share a KV head become the query rows of one head.
A prompt chunk is a call of its own; there the sharing heads become a batch with one set of keys.
With a window, tiles that no query sees are dropped first.

A row's result has the same bits alone or beside others, whole or in chunks (tests hold it). Torch's
attention runs over tiles of 512 keys from the first on, in matrix products whose rounding depends
on their shape in two ways, which padding removes:

    rows     fewer than 4, or not a multiple of 4, have kernels of their own  -> multiples of 4
    keys     from 193 to 383 are summed up in halves, others in steps of 192  -> at least 384
"""

import functools
import math
import threading
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

# Bytes of keys gathered at once; the best of 0.25 to 12 MiB on a 2-core server with 1 MiB of L2.
_GROUP_BYTES = 2 << 20
#: Keys that torch's attention takes at a time, and what its vectors and matrix kernels divide.
_TILE, _VECTOR, _ROWS = 512, 16, 4
#: Keys (from, to) of a tile whose sum is split in halves; here they are padded to the end.
_HALVED = (192, 384)


class _Scratch(threading.local):
    """Memory for gathered blocks, kept: fresh pages cost more than the gathering itself."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def gather(self, cache: torch.Tensor, blocks: torch.Tensor, place: int) -> torch.Tensor:
        """Copy `blocks` of `cache` to the memory `place`.

        Returns [len(blocks) * block_size, Hkv, D], valid until the next call for that place.
        """
        rows = cache.view(cache.shape[0], -1)
        needed = blocks.numel() * rows.shape[1]
        buffer = self._buffers.get((place, cache.dtype))
        if buffer is None or buffer.numel() < needed:
            with torch.inference_mode(mode=False):  # usable in and out of inference mode
                buffer = torch.empty(needed, dtype=cache.dtype)
            self._buffers[place, cache.dtype] = buffer
        gathered = buffer[:needed].view(-1, rows.shape[1])
        torch.index_select(rows, 0, blocks, out=gathered)
        return gathered.view(-1, *cache.shape[2:])


_scratch = _Scratch()


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    *,
    cu_seqlens_q: torch.Tensor,  # [S + 1] int32
    context_lens: torch.Tensor,  # [S] int32
    block_tables: torch.Tensor,  # [S, B] int32
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,  # [T, Hq, D]
) -> torch.Tensor:
    """As `reference.paged_attention`; returns [T, Hq, D]."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    starts, contexts = cu_seqlens_q.tolist(), context_lens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if window is not None:
        contexts, block_tables = _seen_blocks(
            contexts, lengths, block_tables, k_cache.shape[1], window
        )
    scores = _Scores(scale, window, softcap)
    decoding = [number for number, length in enumerate(lengths) if length == 1]
    if decoding:
        decoding.sort(key=contexts.__getitem__)
        order = torch.tensor(decoding)
        rows = cu_seqlens_q[order]
        out[rows] = _decode(
            q[rows],
            k_cache,
            v_cache,
            [contexts[number] for number in decoding],
            block_tables[order],
            scores,
        )
    if max_query_len > 1:
        for number, length in enumerate(lengths):
            if length > 1:
                rows_of = slice(starts[number], starts[number + 1])
                table = block_tables[number]
                out[rows_of] = _chunk(q[rows_of], k_cache, v_cache, contexts[number], table, scores)
    return out


@dataclass(frozen=True, slots=True)
class _Scores:
    """How the products of queries and keys become weights."""

    scale: float
    window: int | None
    softcap: float | None

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,  # added to the scores
    ) -> torch.Tensor:
        """Torch's attention, spelt out where it has no soft cap."""
        if self.softcap is None:
            return scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)
        scores = (q @ keys.transpose(-1, -2)).mul_(self.scale / self.softcap)
        scores = scores.tanh_().mul_(self.softcap)
        weights = scores.add_(mask).softmax(dim=-1)
        tiles = range(0, keys.shape[-2], _TILE)
        parts = [weights[..., t : t + _TILE] @ values[..., t : t + _TILE, :] for t in tiles]
        return functools.reduce(torch.add, parts)


def _seen_blocks(
    contexts: list[int],
    lengths: list[int],
    block_tables: torch.Tensor,  # [S, B]
    block_size: int,
    window: int,
) -> tuple[list[int], torch.Tensor]:
    """Contexts and tables counted from the first tile that any query of a sequence sees."""
    step = math.lcm(_TILE, block_size)
    skipped = [
        max(0, context - length - window + 1) // step * (step // block_size)
        for context, length in zip(contexts, lengths, strict=True)
    ]
    columns = torch.arange(block_tables.shape[1]) + torch.tensor(skipped).unsqueeze(1)
    tables = block_tables.gather(1, columns.clamp_(max=block_tables.shape[1] - 1))
    left = [c - s * block_size for c, s in zip(contexts, skipped, strict=True)]
    return left, tables


def _decode(
    q: torch.Tensor,  # [S, Hq, D]
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    contexts: list[int],  # ascending
    block_tables: torch.Tensor,  # [S, B]
    scores: _Scores,
) -> torch.Tensor:
    """One query per sequence, in groups of similar context length; returns [S, Hq, D]."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    q = q.view(q.shape[0], num_kv_heads, -1, head_dim)  # [S, Hkv, G, D]
    num_rows = q.shape[2]
    q = pad(q, (0, 0, 0, -num_rows % _ROWS))
    out = torch.empty_like(q)
    limits = torch.tensor(contexts).unsqueeze(1)
    positions = torch.arange(padded_keys(contexts[-1]))
    behind = positions >= limits
    hidden = behind if scores.window is None else behind | (positions < limits - scores.window)
    mask = torch.zeros(behind.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    block_bytes = k_cache[0].numel() * k_cache.element_size()
    end = len(contexts)
    while end > 0:  # from the longest, which sets the padding of its group
        width = padded_keys(contexts[end - 1])
        num_blocks = -(-width // block_size)
        start = max(0, end - max(1, _GROUP_BYTES // (num_blocks * block_bytes)))
        group = slice(start, end)
        blocks = _cut(block_tables[group], num_blocks)
        keys, values = (
            _scratch.gather(cache, blocks, place).unflatten(0, (end - start, -1))[:, :width]
            for place, cache in enumerate((k_cache, v_cache))
        )
        # What lies behind a context may be NaN, which neither the mask nor a weight of 0 removes.
        shortest = contexts[start]
        foreign = behind[group, shortest:width, None, None]
        keys[:, shortest:].masked_fill_(foreign, 0)
        values[:, shortest:].masked_fill_(foreign, 0)
        out[group] = scores.attend(
            q[group],
            keys.transpose(1, 2).to(q.dtype),
            values.transpose(1, 2).to(q.dtype),
            mask[group, None, None, :width],
        )
        end = start
    return out[:, :, :num_rows].reshape(len(contexts), -1, head_dim)


def _chunk(
    q: torch.Tensor,  # [n, Hq, D]
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: int,
    block_table: torch.Tensor,  # [B]
    scores: _Scores,
) -> torch.Tensor:
    """The last n positions of one sequence; returns [n, Hq, D]."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_queries = q.shape[0]
    group = q.shape[1] // num_kv_heads
    width = padded_keys(context)
    blocks = _cut(block_table.unsqueeze(0), -(-width // block_size))
    gathered = [
        _scratch.gather(cache, blocks, place)[:width]
        for place, cache in enumerate((k_cache, v_cache))
    ]
    for rows in gathered:
        rows[context:].zero_()
    keys, values = (
        rows.transpose(0, 1).to(q.dtype).expand(group, -1, -1, -1)  # [G, Hkv, N, D], a view
        for rows in gathered
    )
    heads = q.view(num_queries, num_kv_heads, group, head_dim).permute(2, 1, 0, 3)
    heads = pad(heads, (0, 0, 0, -num_queries % _ROWS))
    before = context - num_queries
    hidden = torch.full((heads.shape[2], width), float("-inf"), dtype=q.dtype)
    mask = hidden.triu(before + 1)
    if scores.window is not None:
        mask += hidden.tril_(before - scores.window)
    out = scores.attend(heads, keys, values, mask)[:, :, :num_queries]
    return out.permute(2, 1, 0, 3).reshape(num_queries, -1, head_dim)


def padded_keys(count: int) -> int:
    """Keys to attend to, so that `count` of them are summed up as they would be among more."""
    rest = count % _TILE
    low, high = _HALVED
    padded = -(-rest // _VECTOR) * _VECTOR
    return count - rest + (high if low < padded < high else padded)


def _cut(tables: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Block tables [S, B] cut or filled up to `num_blocks` columns, flat."""
    missing = max(num_blocks - tables.shape[1], 0)
    return pad(tables[:, :num_blocks], (0, missing)).reshape(-1)
