"""The command line: `tokenmill`, and `python -m tokenmill.producer.cli`."""

import json
import logging
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from tokenmill.producer.batches_cli import batch
from tokenmill.producer.client import Client
from tokenmill.producer.commands import (
    FAILED,
    INTERRUPTED,
    OK,
    ROWS_FAILED,
    CommandError,
    CommandGroup,
    check_model,
)
from tokenmill.producer.doctor import Status, examine
from tokenmill.producer.errors import InvalidRequest, RequestFailed
from tokenmill.producer.generate import generate
from tokenmill.producer.local_worker import end_with_parent
from tokenmill.producer.operator_cli import dead_group, queue_group
from tokenmill.producer.options import (
    given_sampling,
    json_option,
    option,
    plan_options,
    sampling_options,
    server_options,
)
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import HumanReport, JsonReport
from tokenmill.producer.wire import Delta, Result

#: How a row of `doctor` begins.
_MARKS = {Status.OK: "ok  ", Status.WARN: "warn", Status.FAIL: "FAIL"}


@click.group(
    cls=CommandGroup,
    context_settings={
        "auto_envvar_prefix": "TOKENMILL",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.version_option(package_name="tokenmill")
def tokenmill() -> None:
    """Generate text in bulk: prompts into a Redis queue, answers streamed back by GPU workers."""


@tokenmill.command("generate")
@plan_options
@sampling_options
@server_options
@option("--live", is_flag=True, help="Print the answers as they come, in the order of the input.")
@option("--overwrite", is_flag=True, help="Begin anew, though there is an output or part of one.")
@json_option
def generate_command(
    *, url: str | None, live: bool, as_json: bool, plan: dict[str, Any], **sampling: Any
) -> None:
    """Answer every row of a file (JSONL, OpenAI batch JSONL).

    Stopped anyhow and started again, it goes on where it was. Without a server it brings its own
    server and worker. A bad row is reported and does not stop the others.

    Exit codes: 0 all rows answered, 2 usage, 3 some rows failed, 4 server unreachable,
    130 interrupted.
    """
    overwrite = sampling.pop("overwrite")
    made = Plan(**plan, sampling=given_sampling(**sampling), overwrite=overwrite)
    for text in made.lora:  # before an output is begun that could not go on without it
        name, _, directory = text.partition("=")
        if not (Path(directory) / "adapter_config.json").is_file():
            expected = "a directory with adapter_config.json, as PEFT writes it"
            raise InvalidRequest(f"lora.{name}", expected, directory)
    # Shells start background commands with SIGINT ignored; whoever sends it to us means it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    # The report tells of a lost server; the log line beside it would say it twice.
    logging.getLogger("tokenmill.producer.following").setLevel(logging.ERROR)
    try:
        if as_json:
            outcome = generate(made, JsonReport(live=live), url=url, check_model=check_model)
        else:
            with HumanReport(live=live) as report:
                outcome = generate(made, report, url=url, check_model=check_model)
    except KeyboardInterrupt as error:
        text = f"interrupted; the answers so far are kept. To go on:\n  {_same_command()}"
        raise CommandError(text, INTERRUPTED) from error
    if outcome.failed:
        raise click.exceptions.Exit(ROWS_FAILED)


@tokenmill.command()
@click.argument("prompt")
@option("--follow", "-f", "follows", is_flag=True, help="Print the text as it comes.")
@option("--raw", is_flag=True, help="Send the text as it is, not as a chat message.")
@option("--model", envvar="TOKENMILL_MODEL", default="", help="Default: what the queue serves.")
@option("--priority", type=click.IntRange(0, 2), default=1, help="0 is served first.")
@sampling_options
@server_options
@json_option
def submit(
    *,
    prompt: str,
    follows: bool,
    raw: bool,
    model: str,
    priority: int,
    queue: str,
    url: str | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Enqueue a prompt; print its id, or with --follow its text.

    PROMPT is the text; - reads standard input.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise InvalidRequest("prompt", "some text", text)
    fields = given_sampling(**sampling)
    with Client(url, queue=queue) as client:
        _check_served(client, model)
        whole: Any = text if raw else [{"role": "user", "content": text}]
        request_id = client.submit(whole, model=model, priority=priority, **fields)
        if not follows:
            click.echo(json.dumps({"id": request_id}) if as_json else request_id)
            return
        if not client.workers():
            click.echo(f"no worker is live on queue {queue} yet: waiting", err=True)
        try:
            _print_deltas(client, request_id, 0, as_json=as_json)
        except KeyboardInterrupt as error:
            remedy = f"to go on reading:\n  tokenmill follow {request_id}"
            raise CommandError(f"interrupted; {remedy}", INTERRUPTED) from error


@tokenmill.command()
@click.argument("request_id", metavar="ID")
@option("--start", type=click.IntRange(0), default=0, help="Begin at this token.")
@server_options
@json_option
def follow(*, request_id: str, start: int, queue: str, url: str | None, as_json: bool) -> None:
    """Print a request's text as it comes, from any token on."""
    with Client(url, queue=queue) as client:
        _print_deltas(client, request_id, start, as_json=as_json)


@tokenmill.command("result")
@click.argument("request_id", metavar="ID")
@option("--wait", is_flag=True, help="Wait for its end.")
@server_options
@json_option
def result_command(
    *, request_id: str, wait: bool, queue: str, url: str | None, as_json: bool
) -> None:
    """Print a request's whole answer."""
    with Client(url, queue=queue) as client:
        try:
            result = client.result(request_id, timeout_s=None if wait else 0)
        except TimeoutError as error:
            text = f"request {request_id} has not ended yet; wait for it with --wait"
            raise CommandError(text, FAILED) from error
    if as_json:
        click.echo(json.dumps(_result_fields(result)))
    else:
        click.echo(result.text)
    if not result.ok:
        raise RequestFailed(request_id, result.finish_reason, result.reason)


@tokenmill.command()
@click.argument("request_id", metavar="ID")
@server_options
@json_option
def cancel(*, request_id: str, queue: str, url: str | None, as_json: bool) -> None:
    """Stop a request; what it has so far can still be read."""
    with Client(url, queue=queue) as client:
        is_cancelled = client.cancel(request_id)
    if as_json:
        click.echo(json.dumps({"id": request_id, "cancelled": is_cancelled}))
    else:
        click.echo("cancelled" if is_cancelled else "it had ended already")


@tokenmill.command()
@option("--model", envvar="TOKENMILL_MODEL", default="smollm2", help="The model to look for.")
@server_options
@json_option
def doctor(*, model: str, queue: str, url: str | None, as_json: bool) -> None:
    """Check server, versions, workers, GPU and model.

    Every finding says what to do. Exit code 1 when one has failed.
    """
    worst = Status.OK
    for check in examine(url=url, queue=queue, model=model):
        worst = max(worst, check.status)
        if as_json:
            click.echo(json.dumps(check.fields()))
        else:
            click.echo(f"{_MARKS[check.status]}  {check.name}: {check.detail}")
            if check.remedy:
                click.echo(f"      -> {check.remedy}")
    raise click.exceptions.Exit(FAILED if worst is Status.FAIL else OK)


for _group in (batch, queue_group, dead_group):
    tokenmill.add_command(_group)


def main() -> NoReturn:
    """The console script."""
    end_with_parent()
    tokenmill.main(prog_name="tokenmill")
    sys.exit(OK)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _same_command() -> str:
    """The command that was given, without what would begin anew."""
    script = Path(sys.argv[0])
    if script.name == "cli.py":
        start = [sys.executable, "-m", "tokenmill.producer.cli"]
    else:
        found = shutil.which("tokenmill")
        in_path = found and os.path.realpath(found) == os.path.realpath(script)
        start = ["tokenmill" if in_path else sys.argv[0]]
    return shlex.join([*start, *(word for word in sys.argv[1:] if word != "--overwrite")])


def _check_served(client: Client, model: str) -> None:
    serving = sorted({name for worker in client.workers() for name in worker.models})
    if model and serving and model not in serving:
        expected = f"one that queue {client.queue} serves ({', '.join(serving)})"
        raise InvalidRequest("model", expected, model)
    if model and not serving:
        check_model(model)


def _print_deltas(client: Client, request_id: str, start: int, *, as_json: bool) -> None:
    last: Delta | None = None
    for last in client.follow(request_id, start=start):
        if as_json:
            click.echo(json.dumps(_delta_fields(last)))
        else:
            click.echo(last.text, nl=False)
    if not as_json:
        click.echo("")
    if last and last.finish_reason not in ("stop", "length"):
        raise RequestFailed(request_id, last.finish_reason, last.reason)


def _delta_fields(delta: Delta) -> dict[str, Any]:
    values: dict[str, Any] = {"id": delta.request_id, "start": delta.start, "text": delta.text}
    values["token_ids"] = list(delta.token_ids)
    if delta.finish_reason:
        values |= {"finish_reason": delta.finish_reason, "reason": delta.reason}
    if delta.usage:
        values["usage"] = _usage(delta)
    return values


def _result_fields(result: Result) -> dict[str, Any]:
    return {
        "id": result.request_id,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "reason": result.reason,
        "usage": _usage(result),
    }


def _usage(item: Delta | Result) -> dict[str, int] | None:
    if item.usage is None:
        return None
    return {
        "prompt_tokens": item.usage.prompt_tokens,
        "completion_tokens": item.usage.completion_tokens,
    }


if __name__ == "__main__":
    main()
