"""A program does what its calls do one after another, on one thread and on more than there are."""

import pytest
import torch

from tokenmill.kernels import compiler

pytestmark = pytest.mark.skipif(not compiler.has_wide_vectors(), reason="needs AVX-512")
if compiler.has_wide_vectors():
    from tokenmill.kernels import compiled_rows
    from tokenmill.kernels.parallel import Call
    from tokenmill.kernels.program import Program

WIDTH, CAPACITY, DEPTH = 32, 96, 40


@pytest.fixture(params=[1, 2, 5])
def _threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def norms(rows: torch.Tensor, weights: torch.Tensor, count: int | str) -> list[Call]:
    """Each reads the rows that the one before it has written."""
    return [
        compiled_rows.norm_call(rows[n], None, weight, 1e-5, rows[n + 1], count)
        for n, weight in enumerate(weights)
    ]


@pytest.mark.usefixtures("_threads")
def test_each_call_sees_what_the_one_before_has_written() -> None:
    rows, weights = torch.zeros(DEPTH + 1, CAPACITY, WIDTH), torch.rand(DEPTH, WIDTH) + 0.5
    program = Program(norms(rows, weights, "rows"))
    for count in (1, 9, CAPACITY, 40):
        rows.zero_()
        rows[0] = torch.randn(CAPACITY, WIDTH)
        expected = rows[0, :count]
        for weight in weights:
            expected = compiled_rows.rms_norm(expected, weight, 1e-5)
        program.run({"rows": count})
        assert torch.equal(rows[-1, :count], expected)
        assert not rows[1:, count:].any()


def test_counters_begin_anew_in_every_run() -> None:
    q, k, v = torch.randn(3, 4, 1, 16).unbind()
    table, caches = torch.randn(8, 16), torch.zeros(2, 2, 4, 1, 16)
    positions, slots = torch.tensor([0, 9, 1, 8]), torch.arange(4)
    addresses = (positions.data_ptr(), slots.data_ptr())
    call = compiled_rows.rope_call(q, k, v, table, caches[0], caches[1], "rows", *addresses)
    program = Program([call, call])
    for count, wrong in ((4, 2), (3, 1), (1, 0)):
        program.run({"rows": count})
        assert program.counted(0) == program.counted(1) == wrong


def test_a_name_that_no_argument_has() -> None:
    rows = torch.zeros(2, 8, WIDTH)
    program = Program(norms(rows, torch.ones(1, WIDTH), "rows"))
    with pytest.raises(KeyError, match="row_count"):
        program.run({"row_count": 1})
