"""`Dataset`: the rows of a JSONL file, plain or in OpenAI's batch format, and of its output.

Rows are read and checked one at a time: a bad one is a `BadRow` with its line and field, and the
others go on. Lines are read up to a bound, so that no file can fill the memory.
"""

import enum
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from tokenmill.producer import openai_batch
from tokenmill.producer.errors import InvalidRequest, TokenmillError
from tokenmill.producer.journal import Answer
from tokenmill.producer.params import SamplingParams

MAX_LINE_BYTES = 16 * 2**20
#: Rows whose `custom_id` is remembered, to tell that another has the same: some 100 MB.
MAX_KNOWN_IDS = 1_000_000
#: Columns of plain rows that are sampling parameters; `choice` is too common a name.
_SAMPLING_FIELDS = frozenset(item.name for item in fields(SamplingParams)) - {"choice"}
_BOM = b"\xef\xbb\xbf"


class InputError(TokenmillError):
    """The input file cannot be read, or is of another format."""


class Layout(enum.Enum):
    """How the lines of a file are built."""

    PLAIN = "plain"
    OPENAI = "openai"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How rows are read and written."""

    prompt_field: str = "prompt"
    answer_field: str = "answer"
    #: Send the text of plain rows as it is, not as a chat message.
    raw: bool = False
    #: Sampling where the row itself says nothing.
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row that can be sent."""

    #: Position among the rows, from 0.
    index: int
    #: Line in the file, from 1.
    line: int
    columns: Mapping[str, Any]
    #: Text, token ids or messages, as plain values.
    prompt: Any
    params: SamplingParams
    #: The model that the row names, "" for none.
    model: str = ""
    #: For the chat template, as plain values.
    tools: Any = ()
    #: Where our fields stand in the row, for errors: field -> path.
    names: Mapping[str, str] = field(default_factory=dict)

    def refused(self, error: InvalidRequest) -> "BadRow":
        """This row as a bad one, its error told in the row's own names."""
        head = re.split(r"[.\[]", error.field, maxsplit=1)[0]
        path = self.names.get(head, head) + error.field[len(head) :]
        return BadRow(
            index=self.index,
            line=self.line,
            columns=self.columns,
            field=path,
            message=path + str(error).removeprefix(error.field),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be sent, and why."""

    index: int
    line: int
    #: What could be read of it.
    columns: Mapping[str, Any]
    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one pass over the file tells."""

    rows: int
    digest: str
    layout: Layout
    #: The model that the first row names, "" for none.
    model: str


class Dataset:
    """The rows of one file.

    Raises:
        InputError: it cannot be read, or is no JSONL.
    """

    def __init__(self, path: Path, reading: Reading, layout: Layout | None = None) -> None:
        self.path = path
        self._reading = reading
        self.survey = _survey(path, layout)
        self.layout = self.survey.layout

    def __iter__(self) -> Iterator[Row | BadRow]:
        known: set[bytes] = set()
        with _open(self.path) as file:
            for index, (line, data) in enumerate(_lines(file)):
                row = self._row(index, line, data)
                yield self._once(row, known) if self.layout is Layout.OPENAI else row

    @property
    def error_column(self) -> str:
        """Where an output row tells why it has no answer; null or absent where it has one."""
        return "error" if self.layout is Layout.OPENAI else self._answer_columns()[3]

    def output_row(
        self, row: Row | BadRow, answer: Answer, *, run: str, model: str
    ) -> dict[str, Any]:
        """The row of the output file that belongs to a row."""
        if self.layout is Layout.OPENAI:
            return openai_batch.output_row(row.columns, answer, run, model)
        name, reason, usage, error = self._answer_columns()
        values = dict(row.columns) | {
            name: answer.text if answer.ok or answer.text else None,
            reason: answer.finish_reason,
            usage: {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            },
        }
        if not answer.ok:
            values[error] = {"message": answer.reason, "line": answer.line}
            values[error] |= {"field": answer.field} if answer.field else {}
        return values

    def _answer_columns(self) -> tuple[str, str, str, str]:
        # A second answer to the same rows has its own columns beside the first one's.
        name = self._reading.answer_field
        prefix = "" if name == "answer" else f"{name}_"
        return name, f"{prefix}finish_reason", f"{prefix}usage", f"{prefix}error"

    def _once(self, row: Row | BadRow, known: set[bytes]) -> Row | BadRow:
        """The row, refused where an earlier one has its `custom_id`: the answers would be alike."""
        custom_id = row.columns.get("custom_id")
        if not isinstance(row, Row) or not isinstance(custom_id, str):
            return row
        digest = hashlib.blake2b(custom_id.encode("utf-8", "replace"), digest_size=12).digest()
        if digest in known:
            error = InvalidRequest("custom_id", "another than those before", custom_id)
            return row.refused(error)
        if len(known) < MAX_KNOWN_IDS:
            known.add(digest)
        return row

    def _row(self, index: int, line: int, data: bytes) -> Row | BadRow:
        columns: dict[str, Any] = {}
        try:
            columns = _parse(data)
            if self.layout is Layout.OPENAI:
                return self._openai_row(index, line, columns)
            return self._plain_row(index, line, columns)
        except InvalidRequest as error:
            return BadRow(
                index=index, line=line, columns=columns, field=error.field, message=str(error)
            )

    def _plain_row(self, index: int, line: int, columns: dict[str, Any]) -> Row | BadRow:
        for name in self._answer_columns():
            if name in columns:
                remedy = "rename the column, or choose another --answer-field"
                raise InvalidRequest(name, "a column that the input does not have", name, remedy)
        column = self._reading.prompt_field
        if column not in columns:
            column = "messages" if columns.get("messages") is not None else column
        prompt = columns.get(column)
        if prompt is None:
            known = ", ".join(list(columns)[:8]) or "nothing"
            remedy = f"the row has {known}; name the column with --prompt-field"
            raise InvalidRequest(column, "a column with the prompt", None, remedy)
        if isinstance(prompt, str) and prompt and not self._reading.raw:
            prompt = [{"role": "user", "content": prompt}]
        sampling = {name: columns[name] for name in _SAMPLING_FIELDS & columns.keys()}
        row = self._finished(index, line, columns, prompt, sampling, "", {"prompt": column})
        tools = columns.get("tools") if column == "messages" else ()
        if isinstance(row, Row) and isinstance(tools, list):
            return replace(row, tools=tools)
        return row

    def _openai_row(self, index: int, line: int, columns: dict[str, Any]) -> Row | BadRow:
        name = openai_batch.prompt_field(columns)
        body = columns["body"]
        model = body.get("model") or ""
        if not isinstance(model, str):
            raise InvalidRequest("body.model", "a name", model)
        prompt = openai_batch.prompt_of(body, name)
        sampling = openai_batch.sampling(body, name)
        names = openai_batch.names(body, name)
        row = self._finished(index, line, columns, prompt, sampling, model, names)
        return replace(row, tools=openai_batch.tools_of(body)) if isinstance(row, Row) else row

    def _finished(
        self,
        index: int,
        line: int,
        columns: dict[str, Any],
        prompt: Any,
        sampling: Mapping[str, Any],
        model: str,
        names: Mapping[str, str],
    ) -> Row | BadRow:
        row = Row(
            index=index,
            line=line,
            columns=columns,
            prompt=prompt,
            params=SamplingParams(),
            model=model,
            names=names,
        )
        own = {name: value for name, value in sampling.items() if value is not None}
        defaults = openai_batch.defaults(columns) if self.layout is Layout.OPENAI else {}
        try:
            params = SamplingParams.from_mapping({**defaults, **self._reading.sampling, **own})
            _refuse_logprobs(params)
        except InvalidRequest as error:
            return row.refused(error)
        return replace(row, params=params)


def _refuse_logprobs(params: SamplingParams) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            expected = "not given, as output files have no log probabilities"
            raise InvalidRequest(name, expected, getattr(params, name), "use Client or Pipeline")


def _survey(path: Path, layout: Layout | None) -> Survey:
    digest = hashlib.blake2b(digest_size=16)
    rows = 0
    first: dict[str, Any] = {}
    with _open(path) as file:
        for _line, data in _lines(file):
            digest.update(data)
            if not rows and data.startswith(b"["):
                raise InputError(
                    f"{path} must have one JSON object a line, and begins with an array"
                )
            rows += 1
            if not first:
                try:
                    first = _parse(data)
                except InvalidRequest:
                    continue
    if not rows:
        raise InputError(f"{path} must have at least one row, and is empty")
    batch = openai_batch.is_batch_line(first)
    body = first.get("body")
    model = body.get("model") if batch and isinstance(body, dict) else ""
    return Survey(
        rows=rows,
        digest=digest.hexdigest(),
        layout=layout or (Layout.OPENAI if batch else Layout.PLAIN),
        model=model if isinstance(model, str) else "",
    )


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"input {path} cannot be read: {error.strerror}") from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Line numbers, from 1, and the lines that are not blank; one that is too long comes cut."""
    number = 0
    while data := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = data
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        if number == 1:
            data = data.removeprefix(_BOM)
        if data.strip():
            yield number, data


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_LINE_BYTES:
        expected = f"at most {MAX_LINE_BYTES} bytes long"
        raise InvalidRequest("line", expected, len(data))
    try:
        values = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("line", "JSON", data, str(error)) from error
    if not isinstance(values, dict):
        raise InvalidRequest("line", "a JSON object", values)
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
