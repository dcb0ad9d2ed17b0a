"""Detokenizer: never half a character, stop strings across tokens, a function of the prefix."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.detokenizer import Detokenizer


class ByteTokenizer:
    """One token per byte: every character that is not ASCII spans tokens."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


texts = st.text(st.sampled_from("ab\n é—日🙂\u0301"), max_size=40)
stops = st.lists(st.text(st.sampled_from("ab é日"), min_size=1, max_size=4), max_size=3)


def feed_whole(text: str, stop: list[str]) -> str:
    detokenizer = Detokenizer(ByteTokenizer(), stop)
    return detokenizer.feed(text.encode()) + detokenizer.finish()


def cut(text: str, stop: list[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stop:
                return text[: min(text.find(s) for s in stop if s in text[:end])]
    return text


@given(texts, stops)
@settings(max_examples=300, deadline=None)
def test_text_is_whole_and_cut_at_the_first_stop_string(text: str, stop: list[str]) -> None:
    assert feed_whole(text, stop) == cut(text, stop)


@given(texts, stops, st.lists(st.integers(0, 100), max_size=8))
@settings(max_examples=300, deadline=None)
def test_what_is_emitted_depends_on_the_prefix_alone(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    """Fed in any pieces, and rebuilt at every cut as on resuming, the text is the same."""
    tokens = list(text.encode())
    whole = Detokenizer(ByteTokenizer(), stop)
    emitted = [whole.feed([token]) for token in tokens]
    pieces, at = "", 0
    for end in [*sorted(min(c, len(tokens)) for c in cuts), len(tokens)]:
        resumed = Detokenizer(ByteTokenizer(), stop)
        assert resumed.feed(tokens[:at]) == pieces == "".join(emitted[:at])
        pieces += resumed.feed(tokens[at:end])
        at = end
    assert pieces == "".join(emitted)
    assert (resumed.stopped, resumed.num_tokens) == (whole.stopped, whole.num_tokens)


def test_half_a_character_is_held_back() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    assert [detokenizer.feed([byte]) for byte in "é!".encode()] == ["", "é", "!"]


def test_half_a_character_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(ByteTokenizer())
    assert detokenizer.feed("日".encode()[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_stop_string_is_held_until_it_is_sure() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), ["END"])
    assert detokenizer.feed(b"the E") == "the "
    assert detokenizer.feed(b"N") == ""
    assert detokenizer.feed(b"T") == "ENT"
    assert detokenizer.feed(b" END more") == " "
    assert detokenizer.stopped
    assert detokenizer.num_tokens == len(b"the ENT END")
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("length", [1, 5000])
def test_memory_does_not_grow_with_the_output(length: int) -> None:
    detokenizer = Detokenizer(ByteTokenizer(), ["x" * 200])
    for _ in range(length):
        detokenizer.feed(b"word ")
    assert len(detokenizer._ids) < 10
