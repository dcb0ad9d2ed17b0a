"""Where the commit of a result comes from: a tree without its history has to be told."""

from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_the_commit_is_said_or_asked_of_git_or_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import workloads

    commit = workloads.commit.__wrapped__  # it asks once
    monkeypatch.setenv("TOKENMILL_COMMIT", "abc1234")
    assert commit() == "abc1234"
    monkeypatch.delenv("TOKENMILL_COMMIT")
    monkeypatch.setattr(workloads, "ROOT", tmp_path)
    assert commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == ""
