"""`draw`: one token per row of logits on a CPU, compiled: the draw of `sampler.py` in one pass.

An item of work is a row. Its noise depends on its key and the token alone, so its token does not
depend on the batch.
"""

import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.noise_vectors import draw_row
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import WIDTH, fetch_add, int64s


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (8,))
    num_rows, vocabulary, logits, stride = given[3], given[4], given[5], given[6]
    keys = carray(int64s(given[7]), (num_rows, 3))
    row = fetch_add(data + 8, 1)
    while row < num_rows:
        keys[row, 2] = draw_row(logits + 4 * row * stride, vocabulary, keys[row, 0], keys[row, 1])
        row = fetch_add(data + 8, 1)


def can_draw(logits: torch.Tensor) -> bool:
    """Whether `draw` takes logits [R, V]."""
    is_plain = logits.device.type == "cpu" and logits.dtype == torch.float32
    return is_plain and logits.stride(1) == 1 and logits.shape[1] >= WIDTH


def draw(logits: torch.Tensor, keys: list[int]) -> list[int]:
    """The token of each row of `logits` [R, V], which have their temperature; 64 bits each of key.

    A row of which all logits are -inf, or no numbers, gives -1.
    """
    halves = torch.tensor([(key & 0xFFFFFFFF, key >> 32, 0) for key in keys], dtype=torch.int64)
    num_rows, vocabulary = logits.shape
    if num_rows:
        addresses = [logits.data_ptr(), logits.stride(0), halves.data_ptr()]
        run(Call(_work, [num_rows, vocabulary, *addresses]), num_rows)
    tokens: list[int] = halves.view(-1, 3)[:, 2].tolist()
    return tokens
