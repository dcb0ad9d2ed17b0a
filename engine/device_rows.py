"""`DeviceRows`: what steps are built from on the device, one row for each running sequence.

    tokens                            prompt and output; a step appends what it draws, before the
                                      host knows it
    computed                          how many tokens have their keys and values in the cache
    tables                            blocks
    temperature, top_p, min_p, top_k, seeds, prompts, repetition, presence, frequency
                                      how it is sampled
    bias_tokens, bias_values, ends    what its logits are changed by; bias_sizes, ends_sizes of them
    counts                            how often it has its tokens (`kernels/penalties.py`)

All but the last are cells of one piece of memory, and what a step sends is one message: which
sequences it has, and cells with their new values. The host remembers what it has sent and what
launched steps have made of it, and sends the rest: a row that is new, or a table that has grown.
All that is written there is written by work on the one stream, so a row can be given to another
sequence as soon as its own has ended.
"""

from array import array
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from tokenmill.engine.copies import to_device
from tokenmill.engine.sampler import signed64
from tokenmill.engine.scheduler import Chunk
from tokenmill.engine.sequence import Sequence, SequenceStatus
from tokenmill.producer.params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

#: Cells that each kind of them begins at a multiple of, and each list of a message: kernels are
#: compiled for addresses that are multiples of 16 bytes.
_CELLS, _ITEMS = 64, 4
#: Those of the sampling parameters that are a number for each row.
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(slots=True)
class Row:
    """What the device has of a sequence, behind all steps that have been launched."""

    number: int
    #: Whether its tokens are drawn by top_k or top_p, and whether it asks for more than a token, or
    #: for a token of other logits.
    is_ranked: bool = False
    is_special: bool = False
    num_tokens: int = 0
    num_computed_tokens: int = -1
    #: Tokens of which it knows how often each is there; counted when they are first needed.
    num_counted_tokens: int = 0
    table: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Head:
    """Which rows a step has: their numbers [S], -1 in padding, and prefix sums [S + 1]."""

    numbers: torch.Tensor
    num_seqs: int

    @staticmethod
    def size(num_seqs: int) -> int:
        """Numbers that `num_seqs` sequences take."""
        return _aligned(num_seqs, _ITEMS) + num_seqs + 1

    @property
    def rows(self) -> torch.Tensor:
        return self.numbers[: self.num_seqs]

    @property
    def starts(self) -> torch.Tensor:
        return self.numbers[-self.num_seqs - 1 :]


@dataclass(frozen=True, slots=True)
class RowMessage:
    """What a step sends, as one copy: int32 list by list."""

    numbers: torch.Tensor
    sizes: list[int]
    num_seqs: int

    @classmethod
    def of(cls, lists: "_Lists", num_seqs: int) -> "RowMessage":
        """The message of these lists for `num_seqs` sequences, with padding."""
        missing, numbers, sizes = num_seqs - len(lists.rows), array("i"), list[int]()
        rows = lists.rows + [-1] * (_aligned(num_seqs, _ITEMS) - len(lists.rows))
        sent: list[Seq[int]] = [rows + lists.starts + lists.starts[-1:] * missing]
        sent += [lists.is_sampled, lists.biased, lists.penalized, lists.counted, lists.endless]
        for part in (*sent, lists.cells, lists.values):
            numbers.extend(part)
            numbers.extend([0] * (_aligned(len(part), _ITEMS) - len(part)))
            sizes.append(len(part))
        return cls(torch.frombuffer(numbers, dtype=torch.int32), sizes, num_seqs)

    def parts(self, device: torch.device) -> list[torch.Tensor]:
        """Its lists on a device; the copy is queued there."""
        numbers, begin, found = to_device(self.numbers, device), 0, []
        for size in self.sizes:
            found.append(numbers[begin : begin + size])
            begin += _aligned(size, _ITEMS)
        return found


@dataclass(frozen=True, slots=True)
class Received:
    """A message on the device; all lists but the first two are of places among its sequences."""

    head: Head
    is_sampled: torch.Tensor
    biased: torch.Tensor
    penalized: torch.Tensor
    #: Of those with penalties, how many tokens were counted before.
    counted: torch.Tensor
    #: Those that have not reached `min_tokens`.
    endless: torch.Tensor

    @property
    def is_editing(self) -> bool:
        """Whether logits are changed."""
        return bool(len(self.biased) or len(self.penalized) or len(self.endless))


@dataclass(slots=True)
class LaidOut:
    """A step as the host knows it; places are those of its sequences."""

    message: RowMessage
    #: Who is drawn for, and of these who asks for more than a token, or for one of other logits.
    sampled: list[int]
    special: list[int]
    #: Whether top_k or top_p is asked for.
    is_filtered: bool
    #: Tokens of the longest sequence with penalties.
    longest: int


@dataclass(frozen=True, slots=True)
class _Lists:
    """What `lay_out` gathers: the lists of a message."""

    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    is_sampled: list[int] = field(default_factory=list)
    biased: list[int] = field(default_factory=list)
    penalized: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    endless: list[int] = field(default_factory=list)
    cells: "array[int]" = field(default_factory=lambda: array("i"))
    values: "array[int]" = field(default_factory=lambda: array("i"))

    def set(self, first: int, values: Seq[int]) -> None:
        """Cells from `first` on, and what they become."""
        self.cells.extend(range(first, first + len(values)))
        self.values.extend(values)


class DeviceRows:
    """The resident tensors, and the host's account of them."""

    def __init__(
        self,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        eos_token_ids: Collection[int] = (),
    ) -> None:
        self.block_size = block_size
        self._eos_token_ids = eos_token_ids
        widths = _widths(max_model_len, block_size, len(eos_token_ids))
        self._widths, self._firsts, size = widths, dict[str, int](), 0
        for name, width in widths.items():
            self._firsts[name] = size
            size += _aligned(num_rows * width, _CELLS)
        self._memory = torch.zeros(size, dtype=torch.int32, device=device)

        def column(name: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            first = self._firsts[name]
            return self._memory[first : first + num_rows * widths[name]].view(dtype)

        def table(name: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return column(name, dtype).view(num_rows, -1)

        self.tokens, self.tables, self.computed = (
            table("tokens"),
            table("tables"),
            column("computed"),
        )
        self.temperature, self.top_p, self.min_p, self.repetition, self.presence, self.frequency = (
            column(name, torch.float32) for name in FLOATS
        )
        self.top_k, self.seeds = column("top_k"), column("seeds", torch.int64)
        self.prompts = column("prompts")
        self.bias_sizes, self.bias_tokens = column("bias_sizes"), table("bias_tokens")
        self.bias_values = table("bias_values", torch.float32)
        self.ends_sizes, self.ends = column("ends_sizes"), table("ends")
        self.counts = torch.zeros_like(self.tokens)
        self._rows: dict[Sequence, Row] = {}

    def reset(self) -> None:
        """Forget what has been sent."""
        self._rows = {}

    # -- on the host ---------------------------------------------------------------------------

    def lay_out(self, chunks: Seq[Chunk], num_padded: int) -> LaidOut:
        """What a step of `chunks` sends: rows, prefix sums and changes, padded to `num_padded`.

        The sequences count as computed from here on, and those drawn for as one token longer.
        """
        self._release()
        lists, sampled, special = _Lists(), list[int](), list[int]()
        is_filtered, longest, end = False, 0, 0
        for place, chunk in enumerate(chunks):
            seq, length = chunk.seq, chunk.length
            row = self._row_of(seq, lists)
            self._catch_up(row, chunk, lists)
            end += length
            lists.rows.append(row.number)
            lists.starts.append(end)
            row.num_computed_tokens += length
            is_sampled = row.num_computed_tokens == seq.num_tokens
            lists.is_sampled.append(is_sampled)
            if not is_sampled:
                continue
            sampled.append(place)
            row.num_tokens += 1
            is_filtered |= row.is_ranked
            if row.is_special:
                special.append(place)
                self._edit(place, seq, row, lists)
                longest = max(longest, row.num_counted_tokens)
        message = RowMessage.of(lists, num_padded)
        return LaidOut(message, sampled, special, is_filtered, longest)

    def _release(self) -> None:
        """Who no longer runs has no row."""
        running = SequenceStatus.RUNNING
        self._rows = {seq: row for seq, row in self._rows.items() if seq.status is running}

    def _row_of(self, seq: Sequence, lists: _Lists) -> Row:
        row = self._rows.get(seq)
        if row is None:
            taken = {row.number for row in self._rows.values()}
            number = next(n for n in range(len(self.computed)) if n not in taken)
            params = seq.params
            row = self._rows[seq] = Row(number, params.is_ranked, _is_special(seq))
            for name, values in self._cells_of(seq):
                lists.set(self._cell(name, number), values)
        return row

    def _cells_of(self, seq: Sequence) -> Iterable[tuple[str, Seq[int]]]:
        """What a new row is told once."""
        params = seq.params
        for name in FLOATS:
            yield name, _bits([getattr(params, name)])
        yield "top_k", [params.top_k]
        yield "seeds", array("i", array("q", [signed64(seq.seed)]).tobytes())
        yield "prompts", [seq.num_prompt_tokens]
        if params.logit_bias:
            yield "bias_sizes", [len(params.logit_bias)]
            yield "bias_tokens", list(params.logit_bias)
            yield "bias_values", _bits(params.logit_bias.values())
        if params.min_tokens:
            ends = sorted({*self._eos_token_ids, *params.stop_token_ids})
            yield "ends_sizes", [len(ends)]
            yield "ends", ends

    def _cell(self, name: str, number: int) -> int:
        return self._firsts[name] + number * self._widths[name]

    def _catch_up(self, row: Row, chunk: Chunk, lists: _Lists) -> None:
        """Send what the device lacks of a sequence, and where its chunk starts if it is not there.

        A sequence may have lost its blocks and begun again between two steps.
        """
        seq = chunk.seq
        if row.num_tokens < len(seq.token_ids):
            first = self._cell("tokens", row.number) + row.num_tokens
            lists.set(first, seq.token_ids[row.num_tokens :])
            row.num_tokens = len(seq.token_ids)
        if row.num_computed_tokens != chunk.start:
            lists.set(self._cell("computed", row.number), [chunk.start])
            row.num_computed_tokens = chunk.start
        old, new = row.table, seq.block_table
        if old != new:
            same = len(old) if new[: len(old)] == old else 0
            first = self._cell("tables", row.number)
            for column in range(same, len(new)):
                if column >= len(old) or old[column] != new[column]:
                    lists.set(first + column, [new[column]])
            row.table = list(new)

    def _edit(self, place: int, seq: Sequence, row: Row, lists: _Lists) -> None:
        """Note what a step changes of the logits at `place`."""
        params = seq.params
        if params.logit_bias:
            lists.biased.append(place)
        if seq.num_output_tokens < params.min_tokens:
            lists.endless.append(place)
        if params.has_penalties:
            lists.penalized.append(place)
            lists.counted.append(row.num_counted_tokens)
            row.num_counted_tokens = row.num_computed_tokens

    # -- on the device -------------------------------------------------------------------------

    def receive(self, message: RowMessage) -> Received:
        """Make the changes of a message."""
        from tokenmill.kernels import batch_rows

        head, *parts, cells, values = message.parts(self._memory.device)
        batch_rows.write_cells(self._memory, cells, values)
        return Received(Head(head, message.num_seqs), *parts)


def _is_special(seq: Sequence) -> bool:
    params = seq.params
    edits = params.logit_bias or params.min_tokens or params.has_penalties or seq.constraint
    return bool(edits) or params.logprobs is not None


def row_bytes(max_model_len: int, block_size: int, num_eos: int) -> int:
    """Memory that a row takes on the device."""
    return 4 * (sum(_widths(max_model_len, block_size, num_eos).values()) + max_model_len)


def _widths(max_model_len: int, block_size: int, num_eos: int) -> dict[str, int]:
    """Cells of 32 bits that a row has of each resident tensor; its counts are beside them."""
    return {
        "tokens": max_model_len,
        "computed": 1,
        "tables": -(-max_model_len // block_size),
        **dict.fromkeys((*FLOATS, "top_k", "prompts", "bias_sizes", "ends_sizes"), 1),
        "seeds": 2,
        "bias_tokens": MAX_LOGIT_BIAS,
        "bias_values": MAX_LOGIT_BIAS,
        "ends": MAX_STOP_TOKEN_IDS + num_eos,
    }


def _bits(values: Iterable[float]) -> "array[int]":
    """Of floats in 32 bits, their bits."""
    return array("i", array("f", values).tobytes())


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
