"""Log probabilities on the wire: exact, and joined without a look at them."""

from hypothesis import given
from hypothesis import strategies as st

from tokenmill.producer.logprobs import TokenLogprobs, pack_logprobs, unpack_logprobs

ids = st.integers(0, 2**31 - 1)
values = st.floats(-1e4, 0, width=32)
rows = st.lists(
    st.builds(TokenLogprobs, ids, values, st.lists(st.tuples(ids, values), max_size=20).map(tuple)),
    max_size=5,
)


@given(rows, rows, rows)
def test_joined_rows_come_back(
    prompt: list[TokenLogprobs], first: list[TokenLogprobs], then: list[TokenLogprobs]
) -> None:
    packed = pack_logprobs(prompt, of_prompt=True) + pack_logprobs(first) + pack_logprobs(then)
    assert unpack_logprobs(packed) == ((*first, *then), tuple(prompt))
