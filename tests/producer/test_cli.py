import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tokenmill.producer.cli import tokenmill
from tokenmill.producer.client import Client
from tokenmill.producer.commands import late_command
from tokenmill.producer.embedded import stop_if_idle

pytestmark = pytest.mark.placed("")

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`run("submit", "hi", ...)`; the signal handlers that `generate` sets are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(tokenmill, list(arguments), input=stdin)
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert "Traceback" not in result.output
        return result

    yield invoke
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def url(server_url: str, state: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shared server, named by the environment."""
    monkeypatch.setenv("TOKENMILL_REDIS_URL", server_url)
    return server_url


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(5)))
    return path


def json_lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_help_is_grouped_and_loads_no_torch() -> None:
    code = (
        "import sys; from tokenmill.producer.cli import tokenmill;"
        "tokenmill.main(['--help'], standalone_mode=False);"
        "late = {'torch', 'transformers', 'numpy', 'rq'} & set(sys.modules);"
        "sys.exit(f'loaded: {late}' if late else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sections = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    groups = ["Generate:", "Requests:", "Workers and models:", "Operation:", "Set-up:"]
    assert sections[-5:] == groups
    for name in ("generate", "worker", "models", "submit", "doctor"):
        assert f"\n  {name} " in done.stdout


def test_submit_follow_result(url: str, run: Run, fake_worker: Any) -> None:
    request_id = run("submit", "a b c", "--max-tokens", "2").stdout.strip()
    early = run("result", request_id)
    assert (early.exit_code, "--wait" in early.stderr) == (1, True)
    worker = fake_worker()
    assert run("result", request_id, "--wait").stdout == "c b \n"
    assert run("follow", request_id).stdout == "c b \n"
    assert run("follow", request_id, "--start", "1").stdout == "b \n"
    (found,) = json_lines(run("result", request_id, "--json"))
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
    assert found["finish_reason"] == "stop"
    assert worker.requests[0].prompt[0].role == "user"


def test_submit_follows_and_reads_standard_input(url: str, run: Run, fake_worker: Any) -> None:
    worker = fake_worker()
    assert run("submit", "-", "--follow", "--raw", stdin="x y").stdout == "y x \n"
    assert worker.requests[0].prompt == "x y"
    lines = json_lines(run("submit", "x y", "--follow", "--json"))
    assert "".join(line["text"] for line in lines) == "y x "
    assert lines[-1]["finish_reason"] == "stop"


def test_a_failed_request_has_exit_code_3(url: str, run: Run, fake_worker: Any) -> None:
    fake_worker()
    result = run("submit", "REFUSE", "--follow")
    assert result.exit_code == 3
    assert "refused, as asked" in result.stderr


def test_cancel(url: str, run: Run) -> None:
    request_id = run("submit", "hi").stdout.strip()
    assert run("cancel", request_id).stdout == "cancelled\n"
    assert run("cancel", request_id).exit_code == 0
    result = run("result", request_id)
    assert result.exit_code == 3
    assert "cancelled" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit", "hi", "--max-tokens", "0"), "max_tokens must be an integer from 1"),
        (("submit", "hi", "--temperature", "-1"), "temperature must be a number"),
        (("submit", "  "), "prompt must be some text"),
        (("follow", "0.AAAAAAAAAAAAAAAAAAAAAAAAAA"), "no request"),
        (("follow", "nonsense"), "request_id must be"),
        (("cancel", "0.AAAAAAAAAAAAAAAAAAAAAAAAAA"), "no request"),
        (("submit", "hi", "--queue", "a b"), "queue must be"),
        (("submit", "hi", "--redis", "http://x"), "redis url must be"),
        (("no-such-command",), "No such command"),
        (("generate", "/none.jsonl", "-o", "x"), "does not exist"),
    ],
)
def test_mistakes_have_exit_code_2(
    url: str, run: Run, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_no_server(run: Run, state: Path) -> None:
    result = run("submit", "hi", "--redis", "redis://127.0.0.1:1")
    assert result.exit_code == 4
    assert "--redis or TOKENMILL_REDIS_URL" in result.stderr


def test_a_server_of_another_kind(run: Run, state: Path, questions: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_answer_like_http, args=(listener,), daemon=True)
        answering.start()
        address = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        output = str(questions.with_name("out.jsonl"))
        result = run("generate", str(questions), "-o", output, "--redis", address)
    assert result.exit_code == 4
    assert "is not a Redis" in result.stderr
    assert not Path(output + ".journal").exists()


def _answer_like_http(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def test_generate(url: str, run: Run, fake_worker: Any, questions: Path) -> None:
    fake_worker()
    output = questions.with_name("out.jsonl")
    result = run("generate", str(questions), "-o", str(output), "--live")
    assert result.exit_code == 0, result.stderr
    assert "[1/5] number 0\n0 number \n" in result.stdout
    titles = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert titles == [f"[{n + 1}/5] number {n}" for n in range(5)]
    assert "5 rows answered; 10 tokens" in result.stderr
    again = run("generate", str(questions), "-o", str(output))
    assert again.exit_code == 0
    assert "complete already" in again.stderr


def test_generate_with_an_adapter_that_is_not_there(
    url: str, run: Run, questions: Path, tmp_path: Path
) -> None:
    """Refused before an output is begun, which the corrected command could not go on with."""
    output = tmp_path / "adapted.jsonl"
    result = run("generate", str(questions), "-o", str(output), "--lora", f"x={tmp_path}")
    assert result.exit_code == 2
    assert "lora.x must be a directory with adapter_config.json" in result.output
    assert not list(tmp_path.glob("adapted*"))


def test_generate_with_bad_rows(url: str, run: Run, fake_worker: Any, questions: Path) -> None:
    fake_worker()
    with questions.open("a") as file:
        file.write("{broken\n")
    result = run("generate", str(questions), "-o", str(questions) + ".out")
    assert result.exit_code == 3
    assert "line 6: line must be JSON" in result.stderr
    assert "5 rows answered, 1 failed" in result.stderr
    again = run("generate", str(questions), "-o", str(questions) + ".out")
    assert again.exit_code == 3
    assert "complete already (6 rows, 1 failed)" in again.stderr


def test_generate_json(url: str, run: Run, fake_worker: Any, questions: Path) -> None:
    fake_worker()
    events = json_lines(
        run("generate", str(questions), "-o", str(questions) + ".out", "--json", "--live")
    )
    assert events[0]["event"] == "begin"
    assert events[-1]["event"] == "end"
    assert events[-1]["answered"] == 5
    assert {event["row"] for event in events if event["event"] == "text"} == set(range(5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-tokens", "0"), "max_tokens must be"),
        (("--temperature", "-1"), "temperature must be"),
        (("--window", "0"), "window must be"),
        (("-o", "/proc/none/out.jsonl"), "cannot be written"),
        (("--model", "nonsense"), "nonsense"),
    ],
)
def test_generate_mistakes(
    url: str, run: Run, fake_worker: Any, questions: Path, flags: tuple[str, ...], message: str
) -> None:
    fake_worker()
    result = run("generate", str(questions), "-o", str(questions) + ".out", *flags)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert {item.name for item in questions.parent.iterdir()} <= {"in.jsonl", "state"}


def test_an_unknown_model_on_the_embedded_server(run: Run, state: Path, questions: Path) -> None:
    output = questions.with_name("out.jsonl")
    result = run("generate", str(questions), "-o", str(output), "--model", "nonsense")
    assert result.exit_code == 2
    assert "smollm2" in result.stderr
    assert "nonsense" in result.stderr
    assert not output.with_name("out.jsonl.journal").exists()
    assert stop_if_idle()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(url: str, fake_worker: Any, questions: Path, number: int) -> None:
    """It prints the command that goes on, and that command does."""
    worker = fake_worker(limit=2)
    command = [sys.executable, "-m", "tokenmill.producer.cli", "generate", str(questions)]
    command += ["-o", str(questions) + ".out", "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.exhausted.wait(30)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    going_on = errors.strip().splitlines()[-1]
    assert "--overwrite" not in going_on
    worker.limit = 100
    done = subprocess.run(going_on, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(Path(str(questions) + ".out").read_text().splitlines()) == 5
    assert len({request.request_id for request in worker.requests}) == 5


def test_every_flag_has_an_environment_variable(
    url: str, run: Run, fake_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_worker()
    monkeypatch.setenv("TOKENMILL_SUBMIT_FOLLOWS", "1")
    monkeypatch.setenv("TOKENMILL_SUBMIT_MAX_TOKENS", "1")
    assert run("submit", "a b c").stdout == "c \n"


def test_a_missing_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_self: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("importlib.metadata.EntryPoint.load", load)
    result = run("worker", "--model", "x")
    assert result.exit_code == 2
    assert "torch is not installed; run: pip install 'tokenmill[worker]'" in result.stderr


def test_models_list_and_unknown_models(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_MODELS_DIR", str(tmp_path))
    assert "tokenmill models pull smollm2" in run("models", "list").stdout
    assert json_lines(run("models", "list", "--json"))[0]["path"] is None
    result = run("models", "pull", "nonsense")
    assert result.exit_code == 2
    assert "smollm2" in result.stderr
    assert late_command("no-such") is None


def test_a_full_queue_says_so(url: str, run: Run) -> None:
    assert run("queue", "set", "--max-live", "1").stdout == "max_live = 1\n"
    assert run("submit", "a").exit_code == 0
    result = run("submit", "b")
    assert result.exit_code == 1
    assert "queue default is full" in result.stderr
    with Client(url) as client:
        assert client.workers() == []
