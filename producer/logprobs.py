"""`TokenLogprobs`: how likely tokens were, and their form on the wire. Standard library only.

    row   token id u32 | number of likeliest u8, +128 for a prompt token | log probability f32
          then for each of the likeliest: token id u32 | log probability f32     (little-endian)

Rows are simply joined, so what is joined in the server needs no parsing there.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

_HEAD = struct.Struct("<IBf")
_TOP = struct.Struct("<If")
_PROMPT = 128


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of one token, and of the likeliest ones at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def pack_logprobs(rows: Iterable[TokenLogprobs], *, of_prompt: bool = False) -> bytes:
    """Rows of generated tokens, or of the prompt's, as bytes."""
    flag = _PROMPT if of_prompt else 0
    packed = bytearray()
    for row in rows:
        packed += _HEAD.pack(row.token_id, len(row.top) | flag, row.logprob)
        for item in row.top:
            packed += _TOP.pack(*item)
    return bytes(packed)


def unpack_logprobs(
    packed: bytes,
) -> tuple[tuple[TokenLogprobs, ...], tuple[TokenLogprobs, ...]]:
    """Undo `pack_logprobs`, of joined rows: those of generated tokens, those of the prompt."""
    output: list[TokenLogprobs] = []
    prompt: list[TokenLogprobs] = []
    at = 0
    while at < len(packed):
        token_id, kind, logprob = _HEAD.unpack_from(packed, at)
        begin = at + _HEAD.size
        at = begin + (kind & ~_PROMPT) * _TOP.size
        top = tuple(_TOP.iter_unpack(packed[begin:at]))
        (prompt if kind & _PROMPT else output).append(TokenLogprobs(token_id, logprob, top))
    return tuple(output), tuple(prompt)
