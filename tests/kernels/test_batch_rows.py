"""Steps built on the device against `build_batch` on the host."""

from dataclasses import dataclass

import pytest
import torch

from tokenmill.engine.batch import RaggedBatch, build_batch
from tokenmill.engine.scheduler import Chunk
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.params import SamplingParams

ROWS, LENGTH, BLOCK_SIZE, BLOCKS = 7, 50, 4, 13


@dataclass
class Step:
    """Sequences that hold rows of the device, and the chunks of a step."""

    device: torch.device
    chunks: list[Chunk]
    rows: list[int]

    def __post_init__(self) -> None:
        self.tokens = torch.full((ROWS, LENGTH), -9, dtype=torch.int32)
        self.computed = torch.full((ROWS,), -9, dtype=torch.int32)
        self.tables = torch.zeros((ROWS, BLOCKS), dtype=torch.int32)
        for row, chunk in zip(self.rows, self.chunks, strict=True):
            seq = chunk.seq
            self.tokens[row, : seq.num_tokens] = torch.tensor(seq.token_ids)
            self.computed[row] = chunk.start
            self.tables[row, : len(seq.block_table)] = torch.tensor(seq.block_table)
        self.tokens = self.tokens.to(self.device)
        self.computed = self.computed.to(self.device)
        self.tables = self.tables.to(self.device)

    def sent(self, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and prefix sums, with padding behind the last chunk."""
        missing = padded - len(self.rows)
        ends = [0]
        for chunk in self.chunks:
            ends.append(ends[-1] + chunk.length)
        rows = torch.tensor(self.rows + [-1] * missing, dtype=torch.int32)
        starts = torch.tensor(ends + ends[-1:] * missing, dtype=torch.int32)
        return rows.to(self.device), starts.to(self.device)

    def build(self, padded_chunks: int, padded_tokens: int) -> dict[str, torch.Tensor]:
        from tokenmill.kernels.batch_rows import build_step

        def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.full(shape, -7, dtype=dtype, device=self.device)

        out = {
            "ids": new(padded_tokens, dtype=torch.int64),
            "positions": new(padded_tokens, dtype=torch.int64),
            "slots": new(padded_tokens, dtype=torch.int64),
            "context_lens": new(padded_chunks, dtype=torch.int32),
            "block_tables": new(padded_chunks, BLOCKS, dtype=torch.int32),
            "last_tokens": new(padded_chunks, dtype=torch.int64),
        }
        rows, starts = self.sent(padded_chunks)
        build_step(
            rows,
            starts,
            tokens=self.tokens,
            computed=self.computed,
            tables=self.tables,
            block_size=BLOCK_SIZE,
            **out,
        )
        return {name: tensor.cpu() for name, tensor in out.items()}


def make_chunk(seed: int, start: int, length: int, rest: int = 0) -> Chunk:
    """`length` tokens behind `start`, of a sequence that is `rest` longer."""
    draw = torch.Generator().manual_seed(seed)
    count = start + length + rest
    seq = Sequence(
        seq_id=str(seed),
        token_ids=torch.randint(1000, (count,), generator=draw).tolist(),
        num_prompt_tokens=1,
        params=SamplingParams(),
        seed=0,
        max_num_tokens=LENGTH,
    )
    seq.block_table = torch.randperm(99, generator=draw)[: -(-count // BLOCK_SIZE)].tolist()
    return Chunk(seq, start, length)


CHUNKS = {
    "one decode": [(5, 1)],
    "decodes": [(1, 1), (49, 1), (7, 1)],
    "a whole prompt": [(0, 50)],
    "mixed": [(4, 1), (3, 1), (0, 17), (8, 5), (12, 20)],
    "all rows": [(n, n + 1) for n in range(ROWS)],
}


@pytest.mark.parametrize(("more_chunks", "more_tokens"), [(0, 0), (3, 9), (0, 700)])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_the_step_is_the_hosts(
    device: torch.device, chunks: list[tuple[int, int]], more_chunks: int, more_tokens: int
) -> None:
    made = [make_chunk(n, *chunk, rest=n % 2) for n, chunk in enumerate(chunks)]
    made = [c for c in made if c.seq.num_tokens <= LENGTH] or [make_chunk(0, *chunks[0])]
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    step = Step(device, made, order[: len(made)])
    expected = build_batch(made, BLOCK_SIZE)
    num_tokens, num_chunks = len(expected.input_ids), len(made)
    built = step.build(num_chunks + more_chunks, num_tokens + more_tokens)
    assert_tokens(built, expected, num_tokens)
    assert built["context_lens"].tolist() == [*expected.context_lens.tolist(), *[0] * more_chunks]
    assert built["last_tokens"][num_chunks:].eq(0).all()
    assert built["last_tokens"][:num_chunks].equal(expected.cu_seqlens_q[1:].long() - 1)
    width = expected.block_tables.shape[1]
    assert built["block_tables"][:num_chunks, :width].equal(expected.block_tables)
    assert built["block_tables"][num_chunks:].eq(0).all()


def assert_tokens(built: dict[str, torch.Tensor], expected: RaggedBatch, count: int) -> None:
    assert built["ids"][:count].equal(expected.input_ids)
    assert built["positions"][:count].equal(expected.positions)
    assert built["slots"][:count].equal(expected.slot_mapping)
    assert built["ids"][count:].eq(0).all()
    assert built["positions"][count:].eq(0).all()
    assert built["slots"][count:].eq(-1).all()


def test_sampled_tokens_are_the_ids_of_the_next_step(device: torch.device) -> None:
    from tokenmill.kernels.batch_rows import advance

    decoding, unfinished, full = (
        make_chunk(0, 5, 1),
        make_chunk(1, 0, 6, rest=4),
        make_chunk(2, 49, 1),
    )
    step = Step(device, [decoding, unfinished, full], [6, 0, 3])
    rows, starts = step.sent(4)
    before = step.tokens.clone()
    sampled = torch.tensor([77, 88, 99, -1], device=device)
    is_sampled = torch.tensor([1, 0, 1, 1], dtype=torch.int32, device=device)
    advance(rows, starts, is_sampled, sampled, tokens=step.tokens, computed=step.computed)
    assert [step.computed[row].item() for row in (6, 0, 3)] == [6, 6, 50]
    assert step.tokens[6, 6] == 77
    step.tokens[6, 6] = before[6, 6]
    assert step.tokens.equal(before)  # neither the chunk of a prompt, nor a row that is full


def test_cells_are_written_wherever_they_lie(device: torch.device) -> None:
    from tokenmill.kernels.batch_rows import write_cells

    memory = torch.arange(900, dtype=torch.int32, device=device)
    cells = torch.randperm(900, generator=torch.Generator().manual_seed(2))[:300].int()
    values = torch.arange(-300, 0, dtype=torch.int32)
    expected = memory.cpu().index_copy_(0, cells.long(), values)
    write_cells(memory, cells.to(device), values.to(device))
    assert memory.cpu().equal(expected)


def test_int64_rows_are_refused(device: torch.device) -> None:
    from tokenmill.kernels.batch_rows import advance

    step = Step(device, [make_chunk(0, 5, 1)], [0])
    rows, starts = step.sent(1)
    wide = rows.long()
    with pytest.raises(ValueError, match=r"^rows: expected dtype torch.int32, got torch.int64"):
        advance(wide, starts, wide, wide, tokens=step.tokens, computed=step.computed)
