"""A run that was cut off goes on from its journal, and a foreign output is left alone."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from rows import numbered, read_rows, write_rows
from tokenmill.producer.client import Client
from tokenmill.producer.generate import generate
from tokenmill.producer.journal import Answer, Journal, OutputError, journal_path
from tokenmill.producer.keys import Keys
from tokenmill.producer.sent_row import request_id
from told import Told

pytestmark = pytest.mark.placed("")

GENERATE = """
import json, sys
from tokenmill.producer.generate import generate
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import Report
generate(Plan.from_mapping(json.loads(sys.argv[1])), Report(), url=sys.argv[2])
"""


@pytest.mark.usefixtures("delivery")
def test_a_killed_run_goes_on(plan: Any, server_url: str, fake_worker: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle: the second run sends nothing twice and loses nothing."""
    worker = fake_worker(limit=30)
    made = plan(numbered(80), window=20)
    command = [sys.executable, "-c", GENERATE, json.dumps(made.to_mapping()), server_url]
    process = subprocess.Popen(command)
    assert worker.exhausted.wait(30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    journal = journal_path(tmp_path / "out.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"row": 77, "li')  # a torn line
    worker.limit = 10**9
    told = Told()
    generate(made, told, url=server_url)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["answer"] for row in rows] == [f"{n} number " for n in range(80)]
    ids = [request.request_id for request in worker.requests]
    assert len(ids) == len(set(ids)) == 80
    assert told.began[0] == 80
    assert not journal.exists()


@pytest.mark.usefixtures("delivery")
def test_interrupted_and_gone_on(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    fake_worker()
    told = Told()

    def interrupt(_answer: Answer) -> None:
        if len(told.answers) == 5:
            raise KeyboardInterrupt

    told.on_end = interrupt
    made = plan(numbered(20))
    with pytest.raises(KeyboardInterrupt):
        generate(made, told, url=server_url)
    assert not (tmp_path / "out.jsonl").exists()
    again = Told()
    outcome = generate(made, again, url=server_url)
    assert again.began == (20, 5, 0)
    assert outcome.answered == 20
    assert len(read_rows(tmp_path / "out.jsonl")) == 20


def test_stops_in_time_and_goes_on(plan: Any, server_url: str, fake_worker: Any) -> None:
    fake_worker()
    assert not generate(plan(numbered(5)), Told(), url=server_url, stop_at=0.0).complete
    assert generate(plan(), Told(), url=server_url).complete


def test_other_parameters_do_not_fit_the_journal(
    plan: Any, server_url: str, fake_worker: Any
) -> None:
    fake_worker()
    generate(plan(numbered(5)), Told(), url=server_url, stop_at=0.0)
    with pytest.raises(OutputError, match=r"sampling was \{\}, is \{'max_tokens': 3\}.*overwrite"):
        generate(plan(sampling={"max_tokens": 3}), Told(), url=server_url)
    with pytest.raises(OutputError, match="input file has changed"):
        generate(plan(numbered(6)), Told(), url=server_url)


def test_a_complete_output_is_left_alone(plan: Any, server_url: str, fake_worker: Any) -> None:
    worker = fake_worker()
    generate(plan(numbered(5)), Told(), url=server_url)
    outcome = generate(plan(), Told(), url="redis://127.0.0.1:1")  # needs no server
    assert outcome.already
    again = generate(plan(overwrite=True), Told(), url=server_url)
    assert (again.already, again.answered) == (False, 5)
    assert len({request.request_id for request in worker.requests}) == 10


def test_a_foreign_output_is_not_replaced(plan: Any, server_url: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "out.jsonl", [{"n": 1}])
    with pytest.raises(OutputError, match="not the output of"):
        generate(plan(numbered(1)), Told(), url=server_url)
    assert read_rows(tmp_path / "out.jsonl") == [{"n": 1}]


@pytest.mark.usefixtures("delivery")
def test_overwrite_cancels_what_the_old_run_left_in_the_queue(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    worker = fake_worker(limit=3)
    told = Told()
    told.on_end = lambda _answer: _interrupt_after(told, 3)
    with pytest.raises(KeyboardInterrupt):
        generate(plan(numbered(10), window=6), told, url=server_url)
    old = json.loads(journal_path(tmp_path / "out.jsonl").read_text().splitlines()[0])["run"]
    again = Told()
    again.on_begin = lambda: setattr(worker, "limit", 10**9)
    generate(plan(overwrite=True), again, url=server_url)
    with Client(server_url) as client:
        left = [client.result(request_id(old, row, 1), timeout_s=0) for row in range(3, 6)]
    assert {item.finish_reason for item in left} == {"cancelled"}
    assert len(read_rows(tmp_path / "out.jsonl")) == 10


def _interrupt_after(told: Told, count: int) -> None:
    if len(told.answers) == count:
        raise KeyboardInterrupt


def test_another_model_does_not_fit_the_journal(
    plan: Any, server_url: str, fake_worker: Any
) -> None:
    fake_worker()
    generate(plan(numbered(5)), Told(), url=server_url, stop_at=0.0)
    fake_worker(model="other")
    with pytest.raises(OutputError, match="begun with model 'fake', not 'other'"):
        generate(plan(model="other"), Told(), url=server_url)
    assert generate(plan(model="fake"), Told(), url=server_url).answered == 5


def test_two_runs_cannot_write_one_output(plan: Any, server_url: str, fake_worker: Any) -> None:
    fake_worker()
    made = plan(numbered(2))
    held = Journal(Path(made.output), digest="x", parameters={})
    with held, pytest.raises(OutputError, match="another process is writing"):
        generate(made, Told(), url=server_url)


def test_the_failed_rows_of_a_complete_output_are_counted(
    plan: Any, server_url: str, fake_worker: Any
) -> None:
    fake_worker()
    plain = {"prompt": "REFUSE"}
    generate(plan([{"prompt": "a"}, plain], answer_field="b"), Told(), url=server_url)
    again = generate(plan(answer_field="b"), Told(), url=server_url)
    assert (again.already, again.answered, again.failed) == (True, 1, 1)
    body = {"messages": [{"role": "user", "content": "REFUSE"}]}
    line = {"custom_id": "q", "method": "POST", "url": "/v1/chat/completions", "body": body}
    fine = {**line, "custom_id": "r", "body": {"messages": [{"role": "user", "content": "a"}]}}
    generate(plan([line, fine], overwrite=True), Told(), url=server_url)
    again = generate(plan(), Told(), url=server_url)
    assert (again.already, again.answered, again.failed) == (True, 1, 1)


def test_gone_on_with_another_priority(plan: Any, server_url: str, fake_worker: Any) -> None:
    fake_worker(limit=0)
    told = Told()

    def opened(row: int, title: str) -> None:
        raise KeyboardInterrupt

    told.opened = opened  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        generate(plan(numbered(5)), told, url=server_url)
    fake_worker()
    assert generate(plan(priority=0), Told(), url=server_url).answered == 5


def test_the_server_may_forget_what_the_journal_has(
    plan: Any, server_url: str, fake_worker: Any, server: redis.Redis
) -> None:
    worker = fake_worker()
    generate(plan(numbered(3)), Told(), url=server_url)
    for request in worker.requests:
        assert 0 < server.pttl(Keys().record(request.request_id)) <= 600_000
        assert 0 < server.pttl(Keys().output(request.request_id)) <= 600_000


def test_replies_that_come_before_their_row_is_sent_again_are_kept(
    plan: Any, server_url: str, fake_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier attempt had sent three rows; this one has a window of one."""
    monkeypatch.setattr("tokenmill.producer.run.BULK_ROWS", 0)
    worker = fake_worker(limit=0)
    begun = generate(
        plan(numbered(3), window=3), Told(), url=server_url, stop_at=time.monotonic() + 0.2
    )
    assert not begun.complete
    worker.limit = 10**9
    while len(worker.requests) < 3:
        time.sleep(0.01)
    assert generate(plan(numbered(3), window=1), Told(), url=server_url).answered == 3
    assert len(worker.requests) == 3
