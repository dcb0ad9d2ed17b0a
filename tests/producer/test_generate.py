import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tokenmill.producer import run as run_module
from tokenmill.producer.client import Client
from tokenmill.producer.dataset import InputError
from tokenmill.producer.embedded import ensure_server, stop_if_idle
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable
from tokenmill.producer.follower import Follower
from tokenmill.producer.generate import generate
from tokenmill.producer.journal import Answer, Journal, OutputError, journal_path
from tokenmill.producer.keys import Keys
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import Report
from tokenmill.producer.run import Run
from tokenmill.producer.sent_row import request_id

GENERATE = """
import json, sys
from tokenmill.producer.generate import generate
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import Report
generate(Plan.from_mapping(json.loads(sys.argv[1])), Report(), url=sys.argv[2])
"""


class Told(Report):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.answers: list[Answer] = []
        self.began: tuple[int, int, int] = (0, 0, 0)
        self.texts: dict[int, str] = {}
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[Answer], None] = lambda _answer: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, rows: int, done: int, failed: int) -> None:
        self.began = (rows, done, failed)
        self.on_begin()

    def text(self, row: int, text: str, tokens: int) -> None:
        self.texts[row] = self.texts.get(row, "") + text

    def ended(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.on_end(answer)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    def make(rows: list[Any] | None = None, **fields: Any) -> Plan:
        path = tmp_path / "in.jsonl"
        if rows is not None:
            write_rows(path, rows)
        return Plan(**{"input": str(path), "output": str(tmp_path / "out.jsonl")} | fields)

    return make


@pytest.fixture(params=["stream", "bulk"])
def delivery(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers token by token, and whole through one stream as in large runs."""
    monkeypatch.setattr("tokenmill.producer.run.BULK_ROWS", 0 if request.param == "bulk" else 1000)


def numbered(count: int) -> list[Any]:
    return [{"prompt": f"number {n}", "n": n} for n in range(count)]


@pytest.mark.usefixtures("delivery")
def test_all_rows_in_input_order(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    fake_worker()
    outcome = generate(plan(numbered(300), window=16), Told(), url=server_url)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["n"] for row in rows] == list(range(300))
    assert [row["answer"] for row in rows] == [f"{n} number " for n in range(300)]
    assert rows[0]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2}
    assert (outcome.answered, outcome.failed, outcome.tokens) == (300, 0, 600)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.usefixtures("delivery")
def test_bad_and_refused_rows_do_not_stop_the_others(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    fake_worker()
    told = Told()
    rows = [{"prompt": "a b"}, "{broken\n", {"prompt": "REFUSE"}, {"prompt": "c", "top_p": 3}]
    outcome = generate(plan(rows), told, url=server_url)
    written = read_rows(tmp_path / "out.jsonl")
    assert [row["answer"] for row in written] == ["b a ", None, None, None]
    assert written[1]["error"]["line"] == 2
    assert written[2]["error"]["message"] == "refused, as asked"
    assert written[3]["error"]["field"] == "top_p"
    assert (outcome.answered, outcome.failed) == (1, 3)
    assert sorted(item.line for item in told.answers if not item.ok) == [2, 3, 4]


def test_openai_batch(plan: Any, server_url: str, fake_worker: Any, tmp_path: Path) -> None:
    worker = fake_worker()
    body = {"model": "fake", "messages": [{"role": "user", "content": "x y"}], "max_tokens": 1}
    line = {"custom_id": "q", "method": "POST", "url": "/v1/chat/completions", "body": body}
    other = {**line, "custom_id": "r", "body": {**body, "model": "gpt"}}
    generate(plan([line, other]), Told(), url=server_url)
    first, second = read_rows(tmp_path / "out.jsonl")
    assert first["response"]["body"]["choices"][0]["message"]["content"] == "y "
    assert second["error"]["param"] == "body.model"
    assert worker.requests[0].params.max_tokens == 1
    assert worker.requests[0].model == "fake"


def test_surrogates_are_refused_and_written(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    fake_worker()
    rows = ['{"prompt": "\\ud800"}\n', '{"prompt": "a", "note": "\\ud800é"}\n']
    generate(plan(rows), Told(), url=server_url)
    written = read_rows(tmp_path / "out.jsonl")
    assert written[0]["error"]["field"] == "prompt"
    assert written[1]["note"] == "\ud800é"


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


def test_the_embedded_server_and_its_own_worker(
    plan: Any,
    state: Path,
    fake_worker: Any,
    kill: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are brought along, replaced when they are killed, and taken away at the end."""
    workers: list[Any] = []

    class StubWorker:
        def __init__(self, model: str, *, url: str, queue: str) -> None:
            self.fake = fake_worker(model=model, url=url, limit=4 if not workers else 10**9)
            workers.append(self.fake)

        def check(self) -> None:
            pass

        def stop(self) -> None:
            self.fake.stop()

    monkeypatch.setattr("tokenmill.producer.run.LocalWorker", StubWorker)
    told = Told()

    def replace(_answer: Answer) -> None:
        if len(told.answers) == 4:
            workers[0].stop()
            with redis.Redis.from_url(workers[0].url) as client:
                kill(client.info("server")["process_id"])
            workers[0] = fake_worker(model="smollm2", url=ensure_server())

    told.on_end = replace
    outcome = generate(plan(numbered(30), window=8), told)
    assert outcome.answered == 30
    assert told.notes[0] == "starting a worker for smollm2"
    for worker in workers:
        worker.stop()
    assert stop_if_idle()


def test_two_runs_cannot_write_one_output(plan: Any, server_url: str, fake_worker: Any) -> None:
    fake_worker()
    made = plan(numbered(2))
    held = Journal(Path(made.output), digest="x", parameters={})
    with held, pytest.raises(OutputError, match="another process is writing"):
        generate(made, Told(), url=server_url)


@pytest.mark.parametrize("output", ["missing/out.jsonl", "in.jsonl/out.jsonl", "."])
def test_an_output_that_cannot_be_written(
    plan: Any, server_url: str, tmp_path: Path, output: str
) -> None:
    with pytest.raises(OutputError, match="output"):
        generate(plan(numbered(1), output=str(tmp_path / output)), Told(), url=server_url)


def test_input_and_output_must_differ(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="another file than the input"):
        plan(numbered(1), output=str(tmp_path / "in.jsonl"))


def test_no_server(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable, match="TOKENMILL_REDIS_URL"):
        generate(plan(numbered(1)), Told(), url="redis://127.0.0.1:1")
    assert [item.name for item in tmp_path.iterdir()] == ["in.jsonl"]


def test_no_input(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        generate(plan(input=str(tmp_path / "none")), Told())


def test_a_model_that_is_not_served(plan: Any, server_url: str, fake_worker: Any) -> None:
    fake_worker(model="other")
    with pytest.raises(
        InvalidRequest, match=r"model must be one that queue default serves \(other"
    ):
        generate(plan(numbered(1), model="mine"), Told(), url=server_url)


def test_waits_for_a_worker_on_a_named_server(plan: Any, server_url: str, fake_worker: Any) -> None:
    told = Told()
    started = threading.Event()

    def note(text: str) -> None:
        told.notes.append(text)
        if "waiting for a worker" in text and not started.is_set():
            started.set()
            fake_worker(model="smollm2")

    told.note = note  # type: ignore[method-assign]
    outcome = generate(plan(numbered(3)), told, url=server_url)
    assert outcome.answered == 3
    assert "tokenmill worker --model smollm2" in told.notes[0]


@pytest.mark.placed("")
@pytest.mark.usefixtures("delivery")
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_server_that_dies_is_waited_for(
    plan: Any, own_server: Any, fake_worker: Any, tmp_path: Path, is_empty: bool
) -> None:
    """Killed while rows are in flight: gone on when it is back, be it without its data."""
    told = Told()
    worker = fake_worker(url=own_server.url, limit=4)

    def restart(_answer: Answer) -> None:
        if len(told.answers) == 4:
            worker.stop()
            own_server.kill()
            if is_empty:
                shutil.rmtree(own_server.directory / "appendonlydir")

    def note(text: str) -> None:
        told.notes.append(text)
        if text.startswith("waiting for the server"):
            own_server.start()
        if text.startswith("waiting for a worker"):
            fake_worker(url=own_server.url)

    told.on_end, told.note = restart, note  # type: ignore[method-assign]
    outcome = generate(plan(numbered(40), window=8), told, url=own_server.url)
    assert outcome.answered == 40
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["answer"] for row in rows] == [f"{n} number " for n in range(40)]
    assert any("the server is back" in text for text in told.notes)


def test_window_and_sampling_are_checked(plan: Any) -> None:
    with pytest.raises(InvalidRequest, match="window"):
        plan(numbered(1), window=0)
    with pytest.raises(InvalidRequest, match="temperature"):
        plan(numbered(1), sampling={"temperature": -1})
    with pytest.raises(InvalidRequest, match="plan"):
        Plan.from_mapping({"input": "a", "output": "b", "made_up": 1})


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


def test_each_run_has_its_own_lane(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    worker = fake_worker()
    for name in ("a", "b"):
        generate(plan(numbered(2), output=str(tmp_path / name)), Told(), url=server_url)
    tenants = [request.tenant for request in worker.requests]
    runs = [request.request_id[2:].rpartition("-")[0] for request in worker.requests]
    assert tenants == runs
    assert len(set(tenants)) == 2


def test_others_in_the_queue_are_told_of_when_nothing_moves(
    plan: Any, server_url: str, fake_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_QUIET_S", 0.0)
    monkeypatch.setattr(run_module, "_WATCH_S", 0.0)
    worker = fake_worker(limit=0)
    told = Told()
    with Client(server_url) as client:
        for _ in range(3):
            client.submit("ahead of it", priority=0)

    def note(text: str) -> None:
        told.notes.append(text)
        worker.limit = 10**9

    told.note = note  # type: ignore[method-assign]
    assert generate(plan(numbered(2)), told, url=server_url).answered == 2
    assert told.notes == ["waiting for its turn: 3 other requests are live on default"]


@pytest.mark.parametrize("in_stream", [True, False])
def test_an_answer_that_the_server_lost_part_of_is_read_anew(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path, in_stream: bool
) -> None:
    """The reader is ahead of a server that rolled back: in the stream, or beyond its end."""
    worker = fake_worker(limit=0)
    told = Told()
    runs: list[Run] = []

    class Spied(Run):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            runs.append(self)

    def opened(row: int, title: str) -> None:
        follower = runs[0]._reader
        assert isinstance(follower, Follower)
        [key] = follower._cursors
        if in_stream:
            follower._digests[key] = "00" * 8
        else:
            follower._cursors[key] = "9-0"
            follower._heard = -1e9
        worker.limit = 10**9

    told.opened = opened  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenmill.producer.generate.Run", Spied)
        generate(plan(numbered(1)), told, url=server_url)
    assert [row["answer"] for row in read_rows(tmp_path / "out.jsonl")] == ["0 number "]
    assert told.notes == ["line 1: the server has lost part of the answer; reading it anew"]


def test_the_server_may_forget_what_the_journal_has(
    plan: Any, server_url: str, fake_worker: Any, server: redis.Redis
) -> None:
    worker = fake_worker()
    generate(plan(numbered(3)), Told(), url=server_url)
    for request in worker.requests:
        assert 0 < server.pttl(Keys().record(request.request_id)) <= 600_000
        assert 0 < server.pttl(Keys().output(request.request_id)) <= 600_000


def test_a_large_run_takes_whole_answers(
    plan: Any,
    server_url: str,
    fake_worker: Any,
    server: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokenmill.producer.run.BULK_ROWS", 2)
    worker = fake_worker()
    generate(plan(numbered(3)), Told(), url=server_url)
    assert {request.reply_to for request in worker.requests} == {worker.requests[0].tenant}
    assert not any(server.exists(Keys().output(item.request_id)) for item in worker.requests)
    assert server.xlen(Keys().reply(worker.requests[0].reply_to)) == 0


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


@pytest.mark.usefixtures("delivery")
def test_rows_are_spread_over_the_shards(
    plan: Any,
    server_url: str,
    fake_worker: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENMILL_SHARDS", "3")
    worker = fake_worker()
    assert generate(plan(numbered(7)), Told(), url=server_url).answered == 7
    shards = sorted(request.request_id.partition(".")[0] for request in worker.requests)
    assert shards == ["0", "0", "0", "1", "1", "2", "2"]
    answers = [row["answer"] for row in read_rows(tmp_path / "out.jsonl")]
    assert answers == [f"{number} number " for number in range(7)]
