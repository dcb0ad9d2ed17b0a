"""`DeviceRows`: what steps are built from on the device, one row for each running sequence.

    tokens    [R, L]   prompt and output; a step appends what it draws, before the host knows it
    computed  [R]      tokens whose keys and values are in the cache
    tables    [R, B]   blocks
    temperature, top_p, min_p, top_k, seeds   [R]   how it is sampled

The host remembers what it has sent and what launched steps have made of it, and sends the rest: a
row that is new, or a table that has grown. All that is written there is written by work on the
one stream, so a row can be given to another sequence as soon as its own has ended.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch

from tokenmill.engine.copies import to_device
from tokenmill.engine.sampler import signed64
from tokenmill.engine.scheduler import Chunk
from tokenmill.engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class Row:
    """What the device has of a sequence, behind all steps that have been launched."""

    number: int
    num_tokens: int = 0
    num_computed_tokens: int = -1
    table: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RowChanges:
    """Cells of resident tensors, numbered row by row, and their new values."""

    tables: tuple[list[int], list[int]]
    computed: tuple[list[int], list[int]]
    tokens: tuple[list[int], list[int]]
    #: Rows of sequences that are new, their seeds, top_k, and temperature, top_p and min_p.
    rows: list[int]
    seeds: list[int]
    top_k: list[int]
    floats: list[tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class RowMessage:
    """What a step sends, as few copies: integers list by list, and the floats of new rows."""

    numbers: torch.Tensor  # [sum of sizes] int64
    sizes: list[int]
    floats: torch.Tensor  # [N, 3] float32

    def to(self, device: torch.device) -> "RowMessage":
        """The message on a device; the copies are queued there."""
        numbers, floats = to_device(self.numbers, device), to_device(self.floats, device)
        return replace(self, numbers=numbers, floats=floats)


class DeviceRows:
    """The resident tensors, and the host's account of them."""

    def __init__(
        self, num_rows: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_size = block_size
        self.tokens = new(num_rows, max_model_len)
        self.computed = new(num_rows)
        self.tables = new(num_rows, -(-max_model_len // block_size))
        self._floats = new(3, num_rows, dtype=torch.float32)
        self.temperature, self.top_p, self.min_p = self._floats
        self.top_k = new(num_rows)
        self.seeds = new(num_rows, dtype=torch.int64)
        self._rows: dict[Sequence, Row] = {}

    def reset(self) -> None:
        """Forget what has been sent."""
        self._rows = {}

    # -- on the host ---------------------------------------------------------------------------

    def lay_out(self, chunks: Seq[Chunk], num_padded: int) -> RowMessage:
        """What a step of `chunks` sends: rows, prefix sums and changes, padded to `num_padded`.

        The sequences count as computed from here on, and those drawn for as one token longer.
        """
        self._release()
        changes = RowChanges(([], []), ([], []), ([], []), [], [], [], [])
        numbers, starts, is_sampled = [], [0], []
        for chunk in chunks:
            row = self._row_of(chunk.seq, changes)
            self._catch_up(row, chunk, changes)
            numbers.append(row.number)
            starts.append(starts[-1] + chunk.length)
            row.num_computed_tokens += chunk.length
            is_sampled.append(int(row.num_computed_tokens == chunk.seq.num_tokens))
            row.num_tokens += is_sampled[-1]
        missing = num_padded - len(chunks)
        lists = (
            numbers + [-1] * missing,
            starts + starts[-1:] * missing,
            is_sampled,
            *changes.tables,
            *changes.computed,
            *changes.tokens,
            changes.rows,
            changes.seeds,
            changes.top_k,
        )
        return RowMessage(
            torch.tensor([number for part in lists for number in part], dtype=torch.int64),
            [len(part) for part in lists],
            torch.tensor(changes.floats, dtype=torch.float32).view(-1, 3),
        )

    def _release(self) -> None:
        """Who no longer runs has no row."""
        running = SequenceStatus.RUNNING
        self._rows = {seq: row for seq, row in self._rows.items() if seq.status is running}

    def _row_of(self, seq: Sequence, changes: RowChanges) -> Row:
        row = self._rows.get(seq)
        if row is None:
            taken = {row.number for row in self._rows.values()}
            number = next(n for n in range(len(self.computed)) if n not in taken)
            row = self._rows[seq] = Row(number)
            params = seq.params
            changes.rows.append(number)
            changes.seeds.append(signed64(seq.seed))
            changes.top_k.append(params.top_k)
            changes.floats.append((params.temperature, params.top_p, params.min_p))
        return row

    def _catch_up(self, row: Row, chunk: Chunk, changes: RowChanges) -> None:
        """Send what the device lacks of a sequence, and where its chunk starts if it is not there.

        A sequence may have lost its blocks and begun again between two steps.
        """
        seq = chunk.seq
        if row.num_tokens < len(seq.token_ids):
            first = row.number * self.tokens.shape[1]
            changes.tokens[0].extend(range(first + row.num_tokens, first + len(seq.token_ids)))
            changes.tokens[1].extend(seq.token_ids[row.num_tokens :])
            row.num_tokens = len(seq.token_ids)
        if row.num_computed_tokens != chunk.start:
            changes.computed[0].append(row.number)
            changes.computed[1].append(chunk.start)
            row.num_computed_tokens = chunk.start
        old, new = row.table, seq.block_table
        if old != new:
            same = len(old) if new[: len(old)] == old else 0
            columns = [c for c in range(same, len(new)) if c >= len(old) or old[c] != new[c]]
            changes.tables[0].extend(row.number * self.tables.shape[1] + c for c in columns)
            changes.tables[1].extend(new[c] for c in columns)
            row.table = list(new)

    # -- on the device -------------------------------------------------------------------------

    def receive(self, message: RowMessage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make the changes of a message; returns rows, prefix sums and whether each is sampled."""
        numbers, starts, is_sampled, *changes = torch.split(message.numbers, message.sizes)
        tables_at, blocks, computed_at, computed, tokens_at, tokens, rows, seeds, top_k = changes
        for resident, at, values in (
            (self.tables.view(-1), tables_at, blocks),
            (self.computed, computed_at, computed),
            (self.tokens.view(-1), tokens_at, tokens),
            (self.seeds, rows, seeds),
            (self.top_k, rows, top_k),
            (self._floats, rows, message.floats.T),
        ):
            if len(at):
                resident.index_copy_(-1, at, values.to(resident.dtype))
        return numbers, starts, is_sampled
