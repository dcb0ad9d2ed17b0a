import json
from typing import Any

import pytest

from tokenmill.producer.journal import Answer
from tokenmill.producer.progress import HumanReport, JsonReport, Outcome

OUTCOME = Outcome(rows=3, answered=2, failed=1, tokens=10, seconds=2.0, output="out.jsonl")


def answer(row: int, **fields: Any) -> Answer:
    values: dict[str, Any] = {"row": row, "line": row + 1, "finish_reason": "stop"}
    return Answer(**values | fields)


def test_live_text_comes_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    report = HumanReport(live=True)
    report.begin(3, 0, 0)
    for row in range(3):
        report.opened(row, f"question\n {row}")
    report.text(1, "second", 1)
    report.text(0, "fi", 1)
    report.ended(answer(1))
    assert capsys.readouterr().out == "[1/3] question 0\nfi"
    report.text(0, "rst", 1)
    report.ended(answer(0))
    assert capsys.readouterr().out == "rst\n\n[2/3] question 1\nsecond\n\n[3/3] question 2\n"
    report.ended(answer(2, finish_reason="error", reason="why"))
    captured = capsys.readouterr()
    assert captured.out == "[error: why]\n\n"
    assert "line 3: why" in captured.err


def test_a_bad_row_has_no_turn(capsys: pytest.CaptureFixture[str]) -> None:
    report = HumanReport(live=True)
    report.begin(2, 0, 0)
    report.ended(answer(0, finish_reason="error", reason="broken"))
    report.opened(1, "question")
    assert capsys.readouterr().out == "[2/2] question\n"


def test_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with HumanReport() as report:
        report.begin(3, 1, 0)
        report.text(1, "x", 7)
        report.ended(answer(1))
        report.tick()
        report.ended(answer(2, finish_reason="error", reason="why"))
        report.finish(OUTCOME)
    shown = capsys.readouterr().err
    assert "going on: 1 of 3 rows are done" in shown
    assert "1/2" in shown
    assert "tokens/s" in shown
    assert "2 rows answered, 1 failed; 10 tokens in 2.0 s (5 tokens/s): out.jsonl" in shown


def test_plain_lines_have_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    report = HumanReport(bar=False)
    report.begin(100, 0, 0)
    report.text(0, "x", 50)
    report.ended(answer(0))
    now[0] += 10
    report.tick()
    assert capsys.readouterr().err == "1/100 rows, 5 tokens/s, 0:16:30 left\n"


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    report = JsonReport(live=True)
    report.note("n")
    report.begin(2, 0, 0)
    report.text(0, "x", 1)
    report.ended(answer(0, text="x"))
    report.ended(answer(1, finish_reason="error", reason="why", field="prompt"))
    report.tick()
    report.finish(OUTCOME)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["note", "begin", "text", "row", "row_failed", "progress", "end"]
    assert [event["event"] for event in events] == names
    assert events[4]["field"] == "prompt"
    assert events[5]["tokens"] == 1
