"""Timed steps are kept for the next start, where they can be relied on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tokenmill.engine import timings
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cost_model import Timing
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.probe import Probe
from tokenmill.engine.timings import kept_or_timed

#: t = 10 ms + 1 ms for each token.
REGULAR = [Timing(tokens, 0, 0.01 + 0.001 * tokens) for tokens in range(1, 129, 16)]
DISTURBED = [Timing(t.tokens, 0, t.seconds * (1 + 2 * (n % 2))) for n, t in enumerate(REGULAR)]


@pytest.fixture
def model(write_checkpoint: Callable[..., None], tmp_path: Path) -> LoadedModel:
    write_checkpoint(tmp_path / "model", "llama")
    return load(str(tmp_path / "model"), device="cpu")


class Steps:
    """Steps that take what they are said to; the one that is run again, `again` times as long."""

    def __init__(self, timings: list[Timing], *, again: float = 1.0) -> None:
        self._timings = timings
        self._again = again
        self.num_timed = 0

    def timings(self) -> list[Timing]:
        self.num_timed += 1
        return self._timings

    def time_again(self, timings: Sequence[Timing]) -> tuple[Timing, Timing]:
        last = timings[-1]
        return last, replace(last, seconds=self._again * last.seconds)


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "LEAST_S", -1.0)


@pytest.mark.parametrize("again", [0.9, 1.0, 5.0])
def test_a_second_start_reads_them(model: LoadedModel, again: float, tmp_path: Path) -> None:
    assert kept_or_timed(model, Steps(REGULAR), tmp_path / "kept") == REGULAR
    second = Steps([], again=again)
    assert kept_or_timed(model, second, tmp_path / "kept") == REGULAR
    assert second.num_timed == 0


def test_a_step_that_is_faster_than_it_was_has_all_timed_anew(
    model: LoadedModel, tmp_path: Path
) -> None:
    slow = [replace(timing, seconds=3 * timing.seconds) for timing in REGULAR]
    kept_or_timed(model, Steps(slow), tmp_path / "kept")
    assert kept_or_timed(model, Steps(REGULAR, again=0.4), tmp_path / "kept") == REGULAR
    assert kept_or_timed(model, Steps([]), tmp_path / "kept") == REGULAR


def test_each_step_counts_as_it_was_at_its_fastest(model: LoadedModel, tmp_path: Path) -> None:
    slow = [replace(timing, seconds=2 * timing.seconds) for timing in REGULAR]
    kept_or_timed(model, Steps(REGULAR[:-2] + slow[-2:]), tmp_path / "kept")
    second = Steps(slow[:2] + REGULAR[2:], again=0.5)
    assert kept_or_timed(model, second, tmp_path / "kept") == REGULAR


def test_the_step_that_is_run_again_is_the_longest_prompt(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(token_budget=64))
    probe = Probe(engine._runner)
    timings = probe.timings()
    before, now = probe.time_again(timings)
    assert before.tokens == max(timing.tokens for timing in timings[:4])
    assert (now.tokens, now.kv_tokens) == (before.tokens, before.kv_tokens)
    assert now.seconds > 0


def test_another_model_is_timed_itself(
    model: LoadedModel, write_checkpoint: Callable[..., None], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "other", "llama", num_hidden_layers=2)
    other = load(str(tmp_path / "other"), device="cpu")
    kept_or_timed(model, Steps(REGULAR), tmp_path / "kept")
    assert kept_or_timed(other, Steps(DISTURBED), tmp_path / "kept") == DISTURBED


def test_disturbed_steps_are_timed_again(model: LoadedModel, tmp_path: Path) -> None:
    kept_or_timed(model, Steps(DISTURBED), tmp_path / "kept")
    assert kept_or_timed(model, Steps(REGULAR), tmp_path / "kept") == REGULAR


def test_quick_ones_are_not_kept(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timings, "LEAST_S", 60.0)
    kept_or_timed(model, Steps(REGULAR), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "content", ["", "{", '[{"tokens": 1}]', '[{"tokens":1,"kv_tokens":0,"seconds":0}]']
)
def test_a_broken_file_is_written_anew(model: LoadedModel, content: str, tmp_path: Path) -> None:
    kept_or_timed(model, Steps(REGULAR), tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(content)
    assert kept_or_timed(model, Steps(REGULAR), tmp_path / "kept") == REGULAR
    assert len(file.read_text()) > len(content)


def test_a_directory_that_cannot_be_written_is_no_error(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert kept_or_timed(model, Steps(REGULAR), tmp_path / "file" / "kept") == REGULAR
