"""What rank 0 tells the others: the size of the cache, then steps and whose logits are wanted.

A step is the batch as it is uploaded to a device, so that the others need no scheduler, no
sequences and no tokenizer: 24 bytes a token, 4 a block. Little-endian:

    size   1 num_blocks block_size max_model_len dtype  as int64
    step   2 T S B L max_query_len                      as int64, then the tensors' bytes in order
    rows   3 start stop                                 as int64
"""

import struct
from dataclasses import dataclass

import torch

from tokenmill.engine.batch import RaggedBatch

_SIZE, _STEP, _ROWS = 1, 2, 3
#: Of a cache, by their numbers in a message.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The KV cache of every rank, and the longest sequence."""

    num_blocks: int
    block_size: int
    max_model_len: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Rows:
    """Wanted tokens [start, stop) of the last step."""

    start: int
    stop: int


Message = CacheSize | RaggedBatch | Rows


def encode(message: Message) -> bytes:
    """A message as bytes; a batch must be on the host."""
    if isinstance(message, CacheSize):
        held = _DTYPES.index(message.dtype)
        return _head(_SIZE, message.num_blocks, message.block_size, message.max_model_len, held)
    if isinstance(message, Rows):
        return _head(_ROWS, message.start, message.stop)
    sizes = (
        len(message.input_ids),
        *message.block_tables.shape,
        len(message.logits_indices),
        message.max_query_len,
    )
    return b"".join([_head(_STEP, *sizes), *(t.numpy().tobytes() for t in message.tensors())])


def decode(data: bytes) -> Message:
    """What `encode` was given.

    Raises:
        ValueError: it was not made by `encode`.
    """
    kind = data[0] if data else 0
    if kind == _SIZE:
        num_blocks, block_size, longest, held = struct.unpack_from("<4q", data, 1)
        return CacheSize(num_blocks, block_size, longest, _DTYPES[held])
    if kind == _ROWS:
        return Rows(*struct.unpack_from("<2q", data, 1))
    if kind != _STEP:
        raise ValueError(f"the kind of a message must be 1, 2 or 3, got {kind}")
    tokens, sequences, blocks, wanted, longest = struct.unpack_from("<5q", data, 1)
    at, tensors = 1 + 5 * 8, []
    for dtype, shape in (
        (torch.int64, (tokens,)),
        (torch.int64, (tokens,)),
        (torch.int64, (tokens,)),
        (torch.int32, (sequences + 1,)),
        (torch.int32, (sequences,)),
        (torch.int32, (sequences, blocks)),
        (torch.int64, (wanted,)),
    ):
        tensor = torch.empty(shape, dtype=dtype)
        end = at + tensor.nbytes
        tensor.view(-1).view(torch.uint8).numpy()[:] = memoryview(data)[at:end]
        tensors.append(tensor)
        at = end
    return RaggedBatch.of(tensors, longest)


def _head(kind: int, *numbers: int) -> bytes:
    return struct.pack(f"<B{len(numbers)}q", kind, *numbers)
