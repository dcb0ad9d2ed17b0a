"""Integers of 4 or 8 bits packed into words of 32, in the order that `dequant_gemm.py` reads.

Inputs come in blocks of 128, of W = 16 words (4 bits) or 32 (8 bits). Part j of word w of a block
is its input j * W + w:

    word        0      1      2    ...    W - 1
    part 0      0      1      2    ...    W - 1
    part 1      W    W + 1  W + 2  ...   2W - 1
    ...
"""

import torch
from torch.nn.functional import pad

#: Inputs that are packed together; the last block is filled up with zeros.
BLOCK = 128


def words_per_block(bits: int) -> int:
    """W of the table above."""
    return BLOCK * bits // 32


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words [N, B, W] int32 of codes [N, K], each in 0 to 2^bits - 1."""
    num_outputs, depth = codes.shape
    parts = pad(codes, (0, -depth % BLOCK)).view(num_outputs, -1, 32 // bits, words_per_block(bits))
    words = torch.zeros_like(parts[:, :, 0], dtype=torch.int32)
    for part in range(32 // bits):
        words |= parts[:, :, part].to(torch.int32) << (bits * part)
    return words


def unpack_codes(words: torch.Tensor, bits: int, depth: int) -> torch.Tensor:
    """Codes [N, K] int32 of words [N, B, W], K = `depth`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    parts: torch.Tensor = (words[:, :, None, :] >> shifts[:, None]) & (
        2**bits - 1
    )  # [N, B, parts, W]
    return parts.flatten(1)[:, :depth]
