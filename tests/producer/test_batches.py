import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from rq import Callback, Queue
from rq.serializers import JSONSerializer

from tokenmill.producer import batches
from tokenmill.producer.batches import BatchJob, status, submit, work
from tokenmill.producer.cli import tokenmill
from tokenmill.producer.connection import connect
from tokenmill.producer.errors import NotFound
from tokenmill.producer.plan import Plan

# RQ's workers fork, and set signal handlers: each test runs its worker in a process of its own.
WORK = """
import sys
from pathlib import Path
from tokenmill.producer import batches
from tokenmill.producer.connection import connect
url, root, slice_s = sys.argv[1:]
batches.SLICE_S = float(slice_s)
batches.work(connect(url), url=url, root=Path(root), check_model=lambda _model: None, burst=True)
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(20)))
    return Plan(input=str(source), output=str(tmp_path / "out.jsonl"))


def start_worker(url: str, root: Path, slice_s: float = 60.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORK, url, str(root), str(slice_s)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def run_worker(url: str, root: Path, slice_s: float = 60.0) -> str:
    process = start_worker(url, root, slice_s)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return errors


@pytest.mark.placed("", "sentinel")
def test_a_batch_runs_in_the_background(
    server: redis.Redis, server_url: str, fake_worker: Any, plan: Plan, tmp_path: Path
) -> None:
    fake_worker()
    batch_id = submit(server, plan)
    assert status(server, batch_id).state == "queued"
    assert submit(server, plan) == batch_id
    run_worker(server_url, tmp_path)
    found = status(server, batch_id)
    assert (found.state, found.rows, found.done, found.failed) == ("finished", 20, 20, 0)
    rows = [json.loads(line) for line in Path(plan.output).read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"{n} number " for n in range(20)]
    assert [item.batch_id for item in batches.list_batches(server)] == [batch_id]


def test_slices_hand_over(
    server: redis.Redis, server_url: str, fake_worker: Any, plan: Plan, tmp_path: Path
) -> None:
    fake_worker()
    batch_id = submit(server, plan)
    run_worker(server_url, tmp_path, slice_s=0.05)
    assert status(server, batch_id).state == "finished"
    assert len(Path(plan.output).read_text().splitlines()) == 20


def test_a_stopped_worker_hands_its_batch_back(
    server: redis.Redis, server_url: str, fake_worker: Any, plan: Plan, tmp_path: Path
) -> None:
    worker = fake_worker(limit=5)
    batch_id = submit(server, plan)
    process = start_worker(server_url, tmp_path)
    assert worker.exhausted.wait(30)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert status(server, batch_id).state == "queued"
    worker.limit = 100
    run_worker(server_url, tmp_path)
    assert status(server, batch_id).state == "finished"
    ids = [request.request_id for request in worker.requests]
    assert len(ids) == len(set(ids)) == 20


def test_a_mistake_is_told_and_not_repeated(
    server: redis.Redis, server_url: str, plan: Plan, tmp_path: Path
) -> None:
    Path(plan.input).write_text("[1]")
    batch_id = submit(server, plan)
    run_worker(server_url, tmp_path)
    found = status(server, batch_id)
    assert found.state == "failed"
    assert "begins with an array" in found.error


def test_files_outside_the_root_are_refused(
    server: redis.Redis, server_url: str, plan: Plan, tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    batch_id = submit(server, plan)
    run_worker(server_url, inner)
    assert "--root" in status(server, batch_id).error
    assert not Path(plan.output).exists()


def test_no_other_function_callback_or_webhook(
    server: redis.Redis, server_url: str, tmp_path: Path
) -> None:
    """Whoever can write to the server names a function: it is not called."""
    queue = Queue(batches.QUEUE, connection=server, serializer=JSONSerializer)
    made = tmp_path / "made"
    job = queue.enqueue_call(
        "os.mkdir",
        args=(str(made),),
        job_id="evil",
        on_failure=Callback("os.abort"),
        result_ttl=60,
    )
    run_worker(server_url, tmp_path)
    assert not made.exists()
    assert job.get_status().value == "failed"
    assert "func_name must be" in job.latest_result().exc_string
    fetched = BatchJob.fetch("evil", connection=server, serializer=JSONSerializer)
    assert fetched.failure_callback is None
    assert fetched.webhooks == []


def test_nothing_is_pickled(server: redis.Redis, plan: Plan) -> None:
    batch_id = submit(server, plan)
    stored = BatchJob.fetch(batch_id, connection=server, serializer=JSONSerializer).data
    assert json.loads(stored)[0] == batches.RUN


def test_unknown_batch(server: redis.Redis) -> None:
    with pytest.raises(NotFound, match="no batch batch-none"):
        status(server, "batch-none")
    with pytest.raises(NotFound):
        status(server, "not an id!")


def test_the_commands(
    server_url: str, fake_worker: Any, plan: Plan, tmp_path: Path, state: Path
) -> None:
    fake_worker()

    def run(*arguments: str) -> str:
        command = ["batch", *arguments, "--redis", server_url]
        result = CliRunner().invoke(tokenmill, command)
        assert result.exit_code == 0, result.output
        return result.stdout

    batch_id = run("submit", plan.input, "-o", plan.output, "--max-tokens", "1").strip()
    assert json.loads(run("status", batch_id, "--json"))["state"] == "queued"
    command = [sys.executable, "-m", "tokenmill.producer.cli", "batch", "worker", "--burst"]
    command += ["--redis", server_url, "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "finished  20/20 rows" in run("status", batch_id)
    assert batch_id in run("list")
    first = json.loads(Path(plan.output).read_text().splitlines()[0])
    assert first["answer"] == "0 "


def test_work_takes_its_settings(server: redis.Redis, tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = connect(f"unix://{server.connection_pool.connection_kwargs['path']}")
    try:
        work(own, url="u", root=tmp_path, check_model=print, burst=True)
    finally:
        own.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (BatchJob.url, BatchJob.root) == ("u", Path(os.path.realpath(tmp_path)))


@pytest.mark.placed("cluster")
def test_a_cluster_is_refused(server_url: str) -> None:
    done = CliRunner().invoke(tokenmill, ["batch", "list", "--redis", server_url])
    assert done.exit_code != 0
    assert "redis url must be one server or Sentinels" in done.output
