"""Options that several commands share; each has an environment variable."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TextIO

import click

from tokenmill.producer.dataset import Layout
from tokenmill.producer.params import MAX_SCHEMA_BYTES, SamplingParams

Command = Callable[..., Any]

#: An option whose help names its environment variable.
option = partial(click.option, show_envvar=True)

_DEFAULTS = SamplingParams()
_PLAN_FIELDS = (
    "input",
    "output",
    "model",
    "quantization",
    "kv_cache_dtype",
    "lora",
    "prompt_field",
    "answer_field",
    "raw",
    "layout",
    "ignore_row_model",
    "window",
    "priority",
    "queue",
)


def server_options(command: Command) -> Command:
    """Which server and which queue."""
    for wrap in (
        option("--queue", envvar="TOKENMILL_QUEUE", default="default", help="Name of the queue."),
        option(
            "--redis",
            "url",
            envvar="TOKENMILL_REDIS_URL",
            metavar="URL",
            help="redis://, rediss:// or unix://; without one, the embedded server.",
        ),
    ):
        command = wrap(command)
    return command


def json_option(command: Command) -> Command:
    """Output for programs."""
    return option(
        "--json",
        "as_json",
        envvar="TOKENMILL_JSON",
        is_flag=True,
        help="JSON lines on standard output.",
    )(command)


def sampling_options(command: Command) -> Command:
    """The fields of SamplingParams; None where the user said nothing."""
    for wrap in reversed(
        (
            option("--max-tokens", type=int, help=_help("Most tokens of an answer", "max_tokens")),
            option("--min-tokens", type=int, help=_help("Fewest", "min_tokens")),
            option(
                "--temperature",
                type=float,
                help=_help("0 takes the likeliest token", "temperature"),
            ),
            option("--top-k", type=int, help=_help("Sample among the k likeliest", "top_k")),
            option("--top-p", type=float, help=_help("Sample among this probability", "top_p")),
            option("--min-p", type=float, help=_help("Least relative probability", "min_p")),
            option("--repetition-penalty", type=float, help="Above 1 repeats less."),
            option("--presence-penalty", type=float, help="For tokens the answer has, once each."),
            option("--frequency-penalty", type=float, help="The same for each time."),
            option("--adapter", metavar="NAME", help="LoRA adapter to answer with."),
            option("--seed", type=int, help="Makes sampling repeatable."),
            option(
                "--json-schema",
                type=click.File(encoding="utf-8"),
                callback=_text_of,
                help="Answers are JSON that the schema in this file allows.",
            ),
            option("--regex", help="Answers match this regular expression as a whole."),
            option(
                "--choice",
                multiple=True,
                metavar="TEXT",
                help="An answer allowed; repeatable.",
            ),
            option(
                "--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."
            ),
            option("--ignore-eos", is_flag=True, default=None, help="Go on past the model's end."),
        )
    ):
        command = wrap(command)
    return command


def _or_empty(_context: click.Context, _option: click.Parameter, value: str | None) -> str:
    return value or ""


def _text_of(_context: click.Context, _option: click.Parameter, file: TextIO | None) -> str | None:
    return None if file is None else file.read(MAX_SCHEMA_BYTES + 1)


def given_sampling(**values: Any) -> dict[str, Any]:
    """What the user said, checked.

    Raises:
        InvalidRequest: a value is out of bounds; the error names the field.
    """
    given = {name: value for name, value in values.items() if value not in (None, ())}
    return SamplingParams.from_mapping(given).to_mapping() if given else {}


def _help(text: str, name: str) -> str:
    return f"{text} (default {getattr(_DEFAULTS, name)})."


def plan_options(command: Command) -> Command:
    """What a run reads and writes, gathered as `plan`: the fields of a `Plan`."""

    @wraps(command)
    def gathered(**values: Any) -> Any:
        plan = {name: values.pop(name) for name in _PLAN_FIELDS}
        return command(plan=plan, **values)

    wrapped: Command = gathered
    for wrap in reversed(
        (
            click.argument("input", type=click.Path(exists=True, dir_okay=False)),
            option("--output", "-o", required=True, type=click.Path(), help="The file to write."),
            option(
                "--model", envvar="TOKENMILL_MODEL", default="", help="Default: what is served."
            ),
            option(
                "--lora",
                envvar="TOKENMILL_LORA",
                multiple=True,
                metavar="NAME=DIRECTORY",
                help="A LoRA adapter of a worker that is brought along; repeatable.",
            ),
            option(
                "--quantization",
                envvar="TOKENMILL_QUANTIZATION",
                type=click.Choice(["none", "int8", "fp8"]),
                default=None,
                callback=_or_empty,
                help="Of the worker, where the run brings one along.",
            ),
            option(
                "--kv-cache-dtype",
                envvar="TOKENMILL_KV_CACHE_DTYPE",
                type=click.Choice(["auto", "float32", "bfloat16", "float16", "fp8"]),
                default=None,
                callback=_or_empty,
                help="The same.",
            ),
            option(
                "--prompt-field", default="prompt", help="Column of plain rows with the prompt."
            ),
            option("--answer-field", default="answer", help="Column of plain rows for the answer."),
            option("--raw", is_flag=True, help="Send plain text as it is, not as a chat message."),
            option(
                "--format",
                "layout",
                envvar="TOKENMILL_FORMAT",
                type=click.Choice([item.value for item in Layout]),
                default=None,
                callback=_or_empty,
                help="Format of the rows; found out by default.",
            ),
            option(
                "--ignore-row-model", is_flag=True, help="Rows may name other models than ours."
            ),
            option("--window", default=256, help="Most rows in flight."),
            option("--priority", type=click.IntRange(0, 2), default=1, help="0 is served first."),
        )
    ):
        wrapped = wrap(wrapped)
    return wrapped
