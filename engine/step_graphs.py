"""`StepGraphs`: the layers of a step as a CUDA graph, one for each padded size.

A size is captured when it is first used, after it has been run once.

    tokens of a step                    padded to           sequences
    only decoding                       one of `decode_sizes`, with the sequences
    others, up to MOST_TOKENS           multiples of 256    max_num_seqs
    more                                not captured

and tables to a power of four of attention's parts, as many as its grid has. Rows and prefix sums
are copied to where the graph reads them; lengths, positions and tables it makes from the resident
rows.
Drawing is left out: it depends on what the requests ask.

Where there is no CUDA a step is the same work on the same memory, run again: for tests.
"""

import bisect
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tokenmill.engine.device_rows import DeviceRows, Head
from tokenmill.engine.device_step import StepBuffers, StepShape
from tokenmill.engine.runner import Runner

#: Mixed steps: multiples of, and the most that are captured.
TOKEN_MULTIPLE, MOST_TOKENS = 256, 2048
#: Positions of one part of decode attention (`kernels/decode_attention.py`).
PART = 256


class StepGraphs:
    """Captured steps, and the memory that they share."""

    def __init__(self, runner: Runner, rows: DeviceRows, max_num_seqs: int) -> None:
        self._runner = runner
        self._block_size, self._most_blocks = rows.block_size, rows.tables.shape[1]
        self._sizes = decode_sizes(max_num_seqs)
        self._buffers = StepBuffers(rows, max_num_seqs, max(MOST_TOKENS, max_num_seqs))
        size = Head.size(max_num_seqs)
        self._numbers = torch.zeros(size, dtype=torch.int32, device=rows.tokens.device)
        self._hidden = runner.new_hidden(max_num_seqs)
        self._captured: dict[StepShape, Callable[[], None]] = {}
        self._pool: Any = None
        self._stream: Any = None

    def padded(self, shape: StepShape) -> StepShape | None:
        """The size that a step is padded to; None: it is not captured."""
        width = self._padded_width(shape.width)
        if shape.max_query_len == 1:
            count = self._sizes[bisect.bisect_left(self._sizes, shape.num_seqs)]
            return StepShape(count, count, width, 1)
        count = -(-shape.num_tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        if count > MOST_TOKENS:
            return None
        return StepShape(count, self._sizes[-1], width, count)

    def run(self, shape: StepShape, head: Head) -> tuple[StepBuffers, torch.Tensor]:
        """The step's tensors and its last hidden states [S, H], until the next run."""
        self._head(shape).numbers.copy_(head.numbers)
        replay = self._captured.get(shape)
        if replay is None:
            replay = self._captured[shape] = self._capture(partial(self._compute, shape))
        replay()
        return self._buffers, self._hidden[: shape.num_seqs]

    def _compute(self, shape: StepShape) -> None:
        """Running it twice changes nothing: rows advance elsewhere."""
        batch = self._buffers.build(shape, self._head(shape), is_padded=True)
        self._hidden[: shape.num_seqs].copy_(self._runner.hidden(batch))

    def _head(self, shape: StepShape) -> Head:
        """Where the graph of that size reads which rows it has."""
        return Head(self._numbers[: Head.size(shape.num_seqs)], shape.num_seqs)

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._hidden.device.type != "cuda":
            return work
        # Never run on a device.
        work()  # compiles kernels and makes workspaces, none of which a capture allows
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # One stream for all: cuBLAS keeps a workspace for each.
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        gc.disable()  # what is collected while a graph is captured would be freed within it
        try:
            # As `torch.cuda.graph`, which gives all cached memory back each time.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    graph.capture_end()
        finally:
            gc.enable()
        return graph.replay

    def _padded_width(self, width: int) -> int:
        parts = -(-width * self._block_size // PART)
        parts = 1 << -(-(parts - 1).bit_length() // 2) * 2  # programs without keys leave at once
        return min(self._most_blocks, -(-parts * PART // self._block_size))


def decode_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then by 16 to 64, by 32 to 256, by 64 beyond; the last is `most`."""
    sizes = [1, 2, 4, 8, *range(16, 64, 16), *range(64, 256, 32), *range(256, most + 64, 64)]
    return [*(size for size in sizes if size < most), most]
