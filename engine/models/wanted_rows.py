"""`WantedRows`: the tokens of a step whose logits are wanted, as the last attention sees them.

A token attends to what is before it in its sequence, so each can be a sequence of its own that
decodes, whichever chunk it came in.
"""

from dataclasses import dataclass

import torch

from tokenmill.engine.batch import RaggedBatch


@dataclass(frozen=True, slots=True)
class WantedRows:
    """L rows of a step, at least one, as L sequences of one token."""

    places: torch.Tensor  # [L] int64, L at least 1
    starts: torch.Tensor  # [L + 1] int32
    contexts: torch.Tensor  # [L] int32
    tables: torch.Tensor  # [L, B] int32
    #: They are those of the step instead, as there are no fewer, or more than sequences.
    are_all: bool = False

    @classmethod
    def of(cls, batch: RaggedBatch) -> "WantedRows":
        """Those of a batch."""
        places, count = batch.logits_indices, len(batch.input_ids)
        starts, contexts, tables = batch.cu_seqlens_q, batch.context_lens, batch.block_tables
        if len(places) == count or len(places) > len(contexts):
            return cls(torch.arange(count), starts, contexts, tables, are_all=True)
        if not len(places):
            places = torch.zeros(1, dtype=torch.int64)  # a part of a prompt: no row will do
        ends = starts[1:]
        owners = torch.searchsorted(ends, places.int(), right=True)
        return cls(
            places,
            torch.arange(len(places) + 1, dtype=torch.int32),
            contexts[owners] - (ends[owners] - 1 - places.int()),
            tables[owners],
        )
