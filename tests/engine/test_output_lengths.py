"""OutputLengths: a quantile of what finished lately, given what an output has already."""

from tokenmill.engine.output_lengths import HISTORY, INITIAL, OutputLengths


def test_before_anything_has_finished_there_is_a_guess() -> None:
    lengths = OutputLengths()
    assert lengths.expect() == INITIAL
    assert lengths.expect(INITIAL) == 2 * INITIAL + 1


def test_four_in_five_are_covered() -> None:
    lengths = OutputLengths()
    for length in range(1, 101):
        lengths.record(length)
    assert lengths.expect() == 80
    assert lengths.expect(50) == 90, "of those longer than 50"
    assert lengths.expect(100) == 201, "longer than all"


def test_only_the_recent_ones_count() -> None:
    lengths = OutputLengths()
    for length in [1000] * HISTORY + [3] * HISTORY:
        lengths.record(length)
    assert lengths.expect() == 3
