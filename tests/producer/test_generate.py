"""Runs from a file to a file: rows, mistakes, models and servers that come and go."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from rows import numbered, read_rows
from tokenmill.producer import run as run_module
from tokenmill.producer.client import Client
from tokenmill.producer.dataset import InputError
from tokenmill.producer.embedded import ensure_server, stop_if_idle
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable
from tokenmill.producer.follower import Follower
from tokenmill.producer.generate import generate
from tokenmill.producer.journal import Answer, OutputError
from tokenmill.producer.keys import Keys
from tokenmill.producer.plan import Plan
from tokenmill.producer.run import Run
from told import Told

pytestmark = pytest.mark.placed("")


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


def test_of_a_worker_that_serves_already_nobody_chooses_the_weights(
    plan: Any, server_url: str, fake_worker: Any
) -> None:
    fake_worker()
    told = Told()
    made = plan(numbered(1), quantization="int8", kv_cache_dtype="float32")
    generate(made, told, url=server_url)
    first, second = told.notes
    assert first.endswith("computes as it was started, whatever --quantization int8 says")
    assert second.endswith("whatever --kv-cache-dtype float32 says")
    others = plan(quantization="", kv_cache_dtype="float32"), plan(quantization="int8")
    assert all(made.parameters() != other.parameters() for other in others)


def test_a_row_may_name_an_adapter_as_its_model(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    worker = fake_worker(adapters=("sql", "french"))
    models = ["sql", "fake", "french", "gpt"]
    lines = [
        {
            "custom_id": model,
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": model, "prompt": "x y"},
        }
        for model in models
    ]
    generate(plan(lines, model="fake"), Told(), url=server_url)
    *answered, refused = read_rows(tmp_path / "out.jsonl")
    assert [row["response"]["body"]["model"] for row in answered] == models[:3]
    assert "model must be 'fake' or 'french' or 'sql', got 'gpt'" in refused["error"]["message"]
    assert sorted(item.model for item in worker.requests) == sorted(models[:3])


def test_a_whole_run_may_take_an_adapter(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    worker = fake_worker(adapters=("sql", "french"))
    rows = [{"prompt": "a"}, {"prompt": "b", "adapter": "french"}]
    generate(plan(rows, model="sql"), Told(), url=server_url)
    asked = sorted((item.model, item.params.adapter) for item in worker.requests)
    assert asked == [("sql", ""), ("sql", "french")]


def test_a_row_whose_adapter_no_worker_has_is_not_sent(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    worker = fake_worker(adapters=("sql", "german"))
    rows = [{"prompt": "a", "adapter": name} for name in ("sql", "french", "fake", "")]
    outcome = generate(plan(rows), Told(), url=server_url)
    assert (outcome.answered, outcome.failed) == (2, 2)
    _, refused, own, _ = read_rows(tmp_path / "out.jsonl")
    expected = "adapter must be one that a worker of fake has (german, sql), got 'french'; load it"
    assert refused["error"]["message"].startswith(expected)
    assert own["error"]["field"] == "adapter"
    assert [item.params.adapter for item in worker.requests] == ["sql", ""]


def test_an_adapter_of_all_rows_that_no_worker_has_ends_the_run(
    plan: Any, server_url: str, fake_worker: Any
) -> None:
    worker = fake_worker()
    told = Told()
    with pytest.raises(InvalidRequest, match=r"a worker of fake has \(none\), got 'french'; load"):
        generate(plan(numbered(2), sampling={"adapter": "french"}), told, url=server_url)
    assert not worker.requests


def test_adapters_of_the_worker_that_is_brought(plan: Any, state: Path) -> None:
    made = plan(numbered(1), lora=["sql=adapters/sql"], sampling={"adapter": "french"})
    with pytest.raises(InvalidRequest, match=r"a worker of smollm2 has \(sql\), got 'french'"):
        generate(made, Told())


def test_surrogates_are_refused_and_written(
    plan: Any, server_url: str, fake_worker: Any, tmp_path: Path
) -> None:
    fake_worker()
    rows = ['{"prompt": "\\ud800"}\n', '{"prompt": "a", "note": "\\ud800é"}\n']
    generate(plan(rows), Told(), url=server_url)
    written = read_rows(tmp_path / "out.jsonl")
    assert written[0]["error"]["field"] == "prompt"
    assert written[1]["note"] == "\ud800é"


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
        def __init__(
            self,
            model: str,
            *,
            url: str,
            queue: str,
            quantization: str,
            kv_cache_dtype: str,
            lora: list[str],
        ) -> None:
            assert (quantization, kv_cache_dtype) == ("int8", "float32")
            assert lora == ["sql=adapters/sql"]
            self.fake = fake_worker(model=model, url=url, limit=4 if not workers else 10**9)
            workers.append(self.fake)

        def check(self) -> None:
            pass

        def stop(self) -> None:
            self.fake.stop()

    monkeypatch.setattr("tokenmill.producer.serving.LocalWorker", StubWorker)
    told = Told()

    def replace(_answer: Answer) -> None:
        if len(told.answers) == 4:
            workers[0].stop()
            with redis.Redis.from_url(workers[0].url) as client:
                kill(client.info("server")["process_id"])
            workers[0] = fake_worker(model="smollm2", url=ensure_server())

    told.on_end = replace
    made = plan(
        numbered(30),
        window=8,
        quantization="int8",
        kv_cache_dtype="float32",
        lora=["sql=adapters/sql"],
    )
    outcome = generate(made, told)
    assert outcome.answered == 30
    assert told.notes[0] == "starting a worker for smollm2"
    for worker in workers:
        worker.stop()
    assert stop_if_idle()


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


@pytest.mark.parametrize("lora", [["sql"], ["sql="], ["=a"], ["sql=a", "sql=b"]], ids=str)
def test_adapters_are_names_with_directories(plan: Any, lora: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="lora must be NAME=DIRECTORY, each name once"):
        plan(numbered(1), lora=lora)
