"""The tensors of a step on the device, and the sizes that they are padded to."""

from dataclasses import dataclass

import torch

from tokenmill.engine.batch import RaggedBatch
from tokenmill.engine.device_rows import DeviceRows, Head
from tokenmill.engine.models.low_rank import Adapted


@dataclass(frozen=True, slots=True)
class StepShape:
    """T tokens of S sequences, whose attention sees tables of `width` blocks; with padding."""

    num_tokens: int
    num_seqs: int
    width: int
    max_query_len: int


class StepBuffers:
    """What `build_step` fills, for up to S sequences of T tokens."""

    def __init__(self, rows: DeviceRows, num_seqs: int, num_tokens: int) -> None:
        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=rows.tokens.device)

        self._resident = rows
        self.ids = new(num_tokens, dtype=torch.int64)
        self.positions = new(num_tokens, dtype=torch.int64)
        self.slots = new(num_tokens, dtype=torch.int64)
        self.context_lens = new(num_seqs, dtype=torch.int32)
        self.block_tables = new(num_seqs, rows.tables.shape[1], dtype=torch.int32)
        self.last_tokens = new(num_seqs, dtype=torch.int64)

    def build(
        self,
        shape: StepShape,
        head: Head,
        *,
        also: torch.Tensor | None = None,
        adapted: Adapted = (),
        is_padded: bool = False,
    ) -> RaggedBatch:
        """Lay the step out from its rows and prefix sums.

        The last hidden states wanted are those of every sequence's last token, then `also`.
        """
        from tokenmill.kernels import batch_rows

        count, seqs, resident = shape.num_tokens, shape.num_seqs, self._resident
        ids, positions, slots = self.ids[:count], self.positions[:count], self.slots[:count]
        contexts, tables = self.context_lens[:seqs], self.block_tables[:seqs]
        wanted = self.last_tokens[:seqs]
        batch_rows.build_step(
            head.rows,
            head.starts,
            tokens=resident.tokens,
            computed=resident.computed,
            tables=resident.tables,
            block_size=resident.block_size,
            ids=ids,
            positions=positions,
            slots=slots,
            context_lens=contexts,
            block_tables=tables,
            last_tokens=wanted,
        )
        return RaggedBatch(
            ids,
            positions,
            slots,
            head.starts,
            contexts,
            tables[:, : shape.width],
            wanted if also is None else torch.cat([wanted, also]),
            shape.max_query_len,
            adapted=adapted,
            is_padded=is_padded,
        )
