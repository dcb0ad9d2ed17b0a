import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenmill.producer.journal import Answer, Journal, OutputError, journal_path


def opened(output: Path, **fields: Any) -> Journal:
    return Journal(output, **{"digest": "d", "parameters": {"a": 1}} | fields)


def answer(row: int, **fields: Any) -> Answer:
    values: dict[str, Any] = {"row": row, "line": row + 1, "text": "A", "finish_reason": "stop"}
    return Answer(**values | fields)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_answers_are_found_again(output: Path) -> None:
    with opened(output) as journal:
        journal.start("m")
        run = journal.header.run
        journal.add(answer(5))
        journal.add(answer(2, finish_reason="error"))
        assert journal.answer(5) == answer(5)
    with opened(output) as journal:
        assert (journal.header.run, journal.header.model) == (run, "m")
        assert (journal.answered, journal.failed) == (1, 1)
        assert [row for row in range(9) if journal.has(row)] == [2, 5]
        journal.add(answer(0))
        assert [journal.answer(row) for row in (0, 1, 5)] == [answer(0), None, answer(5)]


@pytest.mark.parametrize("torn", [b'{"row": 1', b'{"row": 1}', b"\x00\x00\x00\n", b'{"line": 1}\n'])
def test_a_torn_last_line_is_dropped(output: Path, torn: bytes) -> None:
    with opened(output) as journal:
        journal.start("m")
        journal.add(answer(0))
    with journal_path(output).open("ab") as file:
        file.write(torn)
    with opened(output) as journal:
        assert (journal.answered, journal.has(1)) == (1, False)
        journal.add(answer(1))
    lines = journal_path(output).read_bytes().splitlines()
    assert [json.loads(line).get("row") for line in lines] == [None, 0, 1]


def test_a_torn_header_begins_anew(output: Path) -> None:
    journal_path(output).write_bytes(b'{"tokenmill_jour')
    with opened(output) as journal:
        assert journal.is_new
        journal.start("m")
    with opened(output) as journal:
        assert not journal.is_new


def test_nothing_begun_leaves_nothing(output: Path) -> None:
    with opened(output):
        assert journal_path(output).exists()
    assert not journal_path(output).exists()


def test_a_file_that_is_no_journal_is_not_touched(output: Path) -> None:
    journal_path(output).write_text("my notes\n")
    with pytest.raises(OutputError, match="must be a journal"):
        opened(output)
    assert journal_path(output).read_text() == "my notes\n"


def test_overwrite_keeps_what_may_still_be_queued(output: Path) -> None:
    with opened(output) as journal:
        journal.start("m")
        old = journal.header.run
        for row in (0, 1, 4):
            journal.add(answer(row))
    with opened(output, overwrite=True, digest="other") as journal:
        assert journal.superseded_run == old
        assert journal.superseded(3) == [2, 3, 5]
        assert (journal.answered, journal.has(0)) == (0, False)
        journal.start("m")
        assert journal.header.run != old
    with opened(output, digest="other") as journal:
        assert journal.superseded(3) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from tokenmill.producer.journal import Answer, Journal, OutputError
with_journal = Journal(Path(sys.argv[1]), digest="d", parameters={"a": 1})
try:
    with with_journal as journal:
        journal.start("m")
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for row in range(100):
            journal.add(Answer(row=row, line=row + 1, text="A" * 100, finish_reason="stop"))
except OutputError as error:
    print(error)
"""


def test_a_full_disk_is_told_and_gone_on_from(output: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "cannot be written: File too large; run the same command" in done.stdout
    with opened(output) as journal:
        kept = journal.answered
        assert 0 < kept < 100
        journal.add(answer(kept))
    with opened(output) as journal:
        assert journal.answered == kept + 1
