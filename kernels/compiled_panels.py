"""`pack`: a weight laid out for `compiled_linear`, in its own memory.

    weight [N, K]  becomes panels [N / 64, K, 64]: 64 of its rows, transposed

A panel takes the place of its rows, so nothing is in memory twice, and no fresh page is touched.
A thread has one panel at a time apart, in its cache.
"""

import torch
from numba import carray, types

from tokenmill.kernels.compiler import compiled
from tokenmill.kernels.panel_product import PANEL
from tokenmill.kernels.parallel import Call, run
from tokenmill.kernels.vectors import WIDTH, fetch_add, floats, int64s, transpose


@compiled(types.void(types.int64))
def _work(data):
    given = carray(int64s(data), (7,))
    num_panels, depth, weight = given[3], given[4], given[5]
    size = depth * PANEL
    rows_at = given[6] + 4 * size * fetch_add(data, 1)
    rows = carray(floats(rows_at), (PANEL, depth))
    whole = depth - depth % WIDTH
    number = fetch_add(data + 8, 1)
    while number < num_panels:
        panel_at = weight + 4 * size * number
        panel = carray(floats(panel_at), (depth, PANEL))
        plain = carray(floats(panel_at), (PANEL, depth))
        for row in range(PANEL):
            for term in range(depth):
                rows[row, term] = plain[row, term]
        for term in range(0, whole, WIDTH):
            for row in range(0, PANEL, WIDTH):
                source = rows_at + 4 * (row * depth + term)
                transpose(source, depth, panel_at + 4 * (term * PANEL + row), PANEL)
        for term in range(whole, depth):
            for row in range(PANEL):
                panel[term, row] = rows[row, term]
        number = fetch_add(data + 8, 1)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lay out a weight [N, K] of float32 as panels [N / 64, K, 64]; `weight` no longer holds it."""
    weight = weight.contiguous()
    num_columns, depth = weight.shape
    num_panels = num_columns // PANEL
    if num_panels and depth:
        num_threads = min(torch.get_num_threads(), num_panels)
        scratch = torch.empty(num_threads, depth * PANEL, dtype=torch.float32)
        addresses = [weight.data_ptr(), scratch.data_ptr()]
        run(Call(_work, [num_panels, depth, *addresses]), num_panels)
    return weight.view(num_panels, depth, PANEL)
