"""Timed steps are kept for the next start, where they can be relied on."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tokenmill.engine import timings
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cost_model import Timing, kv_tokens_read
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.messages import CacheSize
from tokenmill.engine.models.int8_linear import sums_exactly
from tokenmill.engine.probe import Probe
from tokenmill.engine.timings import kept_or_timed

#: t = 10 ms + 1 ms for each token.
REGULAR = [Timing(tokens, 0, 0.01 + 0.001 * tokens) for tokens in range(1, 129, 16)]
DISTURBED = [Timing(t.tokens, 0, t.seconds * (1 + 2 * (n % 2))) for n, t in enumerate(REGULAR)]

SIZE = CacheSize(num_blocks=64, block_size=32, max_model_len=2048)


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

    def time_again(self, timings: Sequence[Timing]) -> tuple[Timing, Timing] | None:
        last = timings[-1]
        return last, replace(last, seconds=self._again * last.seconds)


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "LEAST_S", -1.0)


@pytest.mark.parametrize("again", [0.9, 1.0, 5.0])
def test_a_second_start_reads_them(model: LoadedModel, again: float, tmp_path: Path) -> None:
    assert kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept") == REGULAR
    second = Steps([], again=again)
    assert kept_or_timed(model, second, SIZE, tmp_path / "kept") == REGULAR
    assert second.num_timed == 0


def test_a_step_that_is_faster_than_it_was_has_all_timed_anew(
    model: LoadedModel, tmp_path: Path
) -> None:
    slow = [replace(timing, seconds=3 * timing.seconds) for timing in REGULAR]
    kept_or_timed(model, Steps(slow), SIZE, tmp_path / "kept")
    assert kept_or_timed(model, Steps(REGULAR, again=0.4), SIZE, tmp_path / "kept") == REGULAR
    assert kept_or_timed(model, Steps([]), SIZE, tmp_path / "kept") == REGULAR


def test_each_step_counts_as_it_was_at_its_fastest(model: LoadedModel, tmp_path: Path) -> None:
    slow = [replace(timing, seconds=2 * timing.seconds) for timing in REGULAR]
    kept_or_timed(model, Steps(REGULAR[:-2] + slow[-2:]), SIZE, tmp_path / "kept")
    second = Steps(slow[:2] + REGULAR[2:], again=0.5)
    assert kept_or_timed(model, second, SIZE, tmp_path / "kept") == REGULAR


def test_the_step_that_is_run_again_is_the_longest_prompt(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(token_budget=64))
    probe = Probe(engine._runner)
    timings = probe.timings()
    again = probe.time_again(timings)
    assert again is not None
    before, now = again
    assert before.tokens == max(timing.tokens for timing in timings[:4])
    assert (now.tokens, now.kv_tokens) == (before.tokens, before.kv_tokens)
    assert now.seconds > 0


def test_only_what_the_context_holds_is_run_again(model: LoadedModel) -> None:
    probe = Probe(Engine(model, EngineConfig(token_budget=64, max_model_len=100))._runner)
    prompts = [Timing(n, kv_tokens_read(0, n), 1.0) for n in (16, 64, 128)]
    again = probe.time_again(prompts)
    assert again is not None
    assert again[0] == prompts[1]
    assert probe.time_again(prompts[2:]) is None
    assert probe.time_again([]) is None


@pytest.mark.parametrize("field", ["num_blocks", "block_size", "max_model_len"])
def test_another_size_of_the_cache_is_timed_itself(
    model: LoadedModel, field: str, tmp_path: Path
) -> None:
    kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept")
    other = replace(SIZE, **{field: getattr(SIZE, field) // 2})
    assert kept_or_timed(model, Steps(DISTURBED), other, tmp_path / "kept") == DISTURBED


@pytest.mark.skipif(not sums_exactly(), reason="this processor adds int8 inexactly")
def test_another_quantization_is_timed_itself(model: LoadedModel, tmp_path: Path) -> None:
    kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept")
    int8 = load(model.name, device="cpu", quantization="int8")
    assert kept_or_timed(int8, Steps(DISTURBED), SIZE, tmp_path / "kept") == DISTURBED


def test_another_processor_is_timed_itself(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept")
    monkeypatch.setattr(timings, "processor", lambda: "another")
    assert kept_or_timed(model, Steps(DISTURBED), SIZE, tmp_path / "kept") == DISTURBED


def test_another_model_is_timed_itself(
    model: LoadedModel, write_checkpoint: Callable[..., None], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "other", "llama", num_hidden_layers=2)
    other = load(str(tmp_path / "other"), device="cpu")
    kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept")
    assert kept_or_timed(other, Steps(DISTURBED), SIZE, tmp_path / "kept") == DISTURBED


def test_disturbed_steps_are_timed_again(model: LoadedModel, tmp_path: Path) -> None:
    kept_or_timed(model, Steps(DISTURBED), SIZE, tmp_path / "kept")
    assert kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept") == REGULAR


def test_quick_ones_are_not_kept(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timings, "LEAST_S", 60.0)
    kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


KEPT = '{"tokens":1,"kv_tokens":1,"seconds":1.0}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "[1]",
        '{"tokens":1}',
        '[{"tokens": 1}]',
        *(
            f"[{KEPT.replace(field, field.split(':')[0] + ':' + wrong)}]"
            for field, wrongs in {
                '"tokens":1': ('"1"', "1.0", "true", "0", "-1", "1000000000", "null", "[]"),
                '"kv_tokens":1': ('"1"', "1.5", "-1", "1000000000"),
                '"seconds":1.0': ('"x"', "0.0", "-1.0", "NaN", "Infinity", "1" + 400 * "0"),
            }.items()
            for wrong in wrongs
        ),
    ],
)
def test_a_broken_file_is_written_anew(model: LoadedModel, content: str, tmp_path: Path) -> None:
    kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    file.write_text(content)
    assert kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept") == REGULAR
    assert file.read_text() != content


def test_a_directory_that_cannot_be_written_is_no_error(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "file" / "kept") == REGULAR


def test_a_full_disk_leaves_nothing_behind(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tokenmill.engine.timings.json.dump", full)
    assert kept_or_timed(model, Steps(REGULAR), SIZE, tmp_path / "kept") == REGULAR
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_user_without_a_home_times_at_every_start(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert kept_or_timed(model, Steps(REGULAR), SIZE) == REGULAR
