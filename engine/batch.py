"""`RaggedBatch`: the chunks of one step as tensors, concatenated without padding."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from tokenmill.engine.logprobs import prompt_positions
from tokenmill.engine.models.low_rank import Adapted, Adapter
from tokenmill.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """T tokens of S sequences; `logits_indices` names the L tokens whose logits are wanted.

    The newest tokens of sequences come first, in the order of their chunks: the next ones are
    sampled from them. Then the prompt tokens, where log probabilities of the prompt are asked for.
    """

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset
    cu_seqlens_q: torch.Tensor  # [S + 1] int32: prefix sums of the chunk lengths
    context_lens: torch.Tensor  # [S] int32: tokens in the cache after this step
    block_tables: torch.Tensor  # [S, B] int32: rows padded with 0, never read past context_lens
    logits_indices: torch.Tensor  # [L] int64
    max_query_len: int
    #: What is added for adapters, which one rank alone may have.
    adapted: Adapted = ()
    #: Whether tokens and sequences follow that are nobody's: of no length, stored nowhere.
    is_padded: bool = False

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in the order above; without those of adapters."""
        return (
            self.input_ids,
            self.positions,
            self.slot_mapping,
            self.cu_seqlens_q,
            self.context_lens,
            self.block_tables,
            self.logits_indices,
        )

    def to(self, device: torch.device) -> "RaggedBatch":
        """The batch on a device; the copies are queued there, from pinned memory."""
        if device.type == "cpu":
            return self
        sent = [t.pin_memory().to(device, non_blocking=True) for t in self.tensors()]
        adapted = [(adapter, rows.to(device)) for adapter, rows in self.adapted]
        return replace(RaggedBatch.of(sent, self.max_query_len), adapted=adapted)

    @classmethod
    def of(cls, tensors: Seq[torch.Tensor], max_query_len: int) -> "RaggedBatch":
        """The batch of `tensors()`."""
        ids, positions, slots, starts, contexts, tables, wanted = tensors
        return cls(ids, positions, slots, starts, contexts, tables, wanted, max_query_len)


def build_batch(
    chunks: Seq[Chunk], block_size: int, adapters: Mapping[str, Adapter] | None = None
) -> RaggedBatch:
    """Lay out one step on the host; a chunk that ends at its newest token is sampled from."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts, logits = [0], [], []
    prompt_logits: list[int] = []
    adapted: dict[str, list[int]] = {}
    for chunk in chunks:
        table, end = chunk.seq.block_table, chunk.start + chunk.length
        if adapter := chunk.seq.params.adapter:
            adapted.setdefault(adapter, []).extend(range(len(ids), len(ids) + chunk.length))
        ids += chunk.seq.token_ids[chunk.start : end]
        positions += range(chunk.start, end)
        prompt_logits += [len(ids) - end + p for p in prompt_positions(chunk)]
        slots += [
            table[p // block_size] * block_size + p % block_size for p in range(chunk.start, end)
        ]
        starts.append(len(ids))
        contexts.append(end)
        if end == chunk.seq.num_tokens:
            logits.append(len(ids) - 1)
    width = max(len(c.seq.block_table) for c in chunks)
    tables = [c.seq.block_table + [0] * (width - len(c.seq.block_table)) for c in chunks]
    return RaggedBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        logits_indices=torch.tensor(logits + prompt_logits, dtype=torch.int64),
        max_query_len=max(c.length for c in chunks),
        adapted=[((adapters or {})[name], torch.tensor(rows)) for name, rows in adapted.items()],
    )
