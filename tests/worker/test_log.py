"""Events as lines for people and for programs."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from tokenmill.worker import log


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, log.LOGGER.level
    yield io.StringIO()
    root.handlers[:], level, log.LOGGER.level = before[0], before[1], before[2]
    root.setLevel(level)


def test_json(lines: io.StringIO) -> None:
    log.configure(as_json=True, level=logging.INFO, stream=lines)
    log.emit(log.SERVER_BACK, after_s=1.23456)
    log.emit(log.FENCED, request_id="0.x", epoch=3)  # below the level
    (line,) = lines.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time") > 0
    assert record == {"level": "info", "event": "server_back", "after_s": 1.235}


def test_human(lines: io.StringIO) -> None:
    log.configure(as_json=False, level=logging.DEBUG, stream=lines)
    log.emit(log.FENCED, request_id="0.x", epoch=3)
    log.emit(log.SERVER_LOST, error="gone")
    first, second = lines.getvalue().splitlines()
    assert first.split(" ", 1)[1] == "request fenced  request_id=0.x  epoch=3"
    assert second.split(" ", 1)[1] == "WARNING: server lost  error=gone"


def test_an_event_has_its_fields_and_no_others() -> None:
    with pytest.raises(ValueError, match="server_lost has the fields"):
        log.emit(log.SERVER_LOST)
    with pytest.raises(ValueError, match="server_lost has the fields"):
        log.emit(log.SERVER_LOST, error="x", prompt="secret")
