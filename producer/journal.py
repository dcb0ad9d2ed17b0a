"""`Journal`: the answers of a run so far, in a file beside its output.

The first line is a header: the run's id, a digest of the input and the parameters. Every other line
is one answer, in the order they came. A torn last line, left by a kill, is dropped. In memory there
are 8 bytes a row, so that millions of rows fit.
"""

import fcntl
import json
import os
import secrets
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from tokenmill.producer.errors import TokenmillError

FORMAT = 1


class OutputError(TokenmillError):
    """The output or its journal does not fit the run, or cannot be written; nothing was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one row."""

    #: Position among the input's rows, from 0.
    row: int
    #: Line of the input, from 1.
    line: int
    text: str = ""
    finish_reason: str
    #: Why, unless it ended as stop or length.
    reason: str = ""
    #: The field at fault, where the row was refused.
    field: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Unix time in seconds.
    ended_s: int = 0

    @property
    def ok(self) -> bool:
        """Whether the row has an answer."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a run is: with another input or other parameters it would be another run."""

    run: str
    #: Digest of the input file.
    input: str
    parameters: Mapping[str, Any]
    model: str = ""
    #: The stream that whole answers come by, "" for a stream of tokens for each row.
    reply_to: str = ""


class Journal:
    """The journal of one output file, held by one process at a time.

    Raises:
        OutputError: it cannot be written, is held by another process, or belongs to another run.
    """

    def __init__(
        self,
        output: Path,
        *,
        digest: str,
        parameters: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self.path = journal_path(output)
        self.answered = 0
        self.failed = 0
        #: The run that `overwrite` ended, "" for none.
        self.superseded_run = ""
        self._superseded: tuple[int, array[int]] = (0, array("q"))
        self._file = _open(self.path, output)
        try:
            _lock(self._file, output)
            #: Offset of the line of each row's answer; -1 where there is none yet.
            self._offsets = array("q")
            header = self._read_header()
            if header and overwrite:
                self._forget(header)
                header = None
            self.header = header or Header(
                run=secrets.token_hex(8), input=digest, parameters=parameters
            )
            self._check(output, digest, parameters)
            self.is_new = header is None
            self._read_answers()
        except BaseException:
            self._file.close()
            raise

    def start(self, model: str, *, reply_to: str = "") -> None:
        """Write the header, once the model is settled; without effect when it is there."""
        if self.is_new:
            self.header = replace(self.header, model=model, reply_to=reply_to)
            self._write({"tokenmill_journal": FORMAT} | asdict(self.header))
            self.sync()
            self.is_new = False

    def add(self, answer: Answer) -> None:
        """Keep an answer: it survives a kill of this process from here on."""
        self._note(answer, self._end)
        self._write(asdict(answer))

    def sync(self) -> None:
        """Return when all answers so far survive a power cut too."""
        with self._writing():
            os.fsync(self._file.fileno())

    def has(self, row: int) -> bool:
        """Whether the row has ended."""
        return row < len(self._offsets) and self._offsets[row] >= 0

    def answer(self, row: int) -> Answer | None:
        """What became of the row; None while that is open."""
        if not self.has(row):
            return None
        self._file.seek(self._offsets[row])
        return Answer(**json.loads(self._file.readline()))

    def superseded(self, window: int) -> list[int]:
        """Rows of the run that was given up which may still be in the queue.

        Rows are sent in order, at most `window` at a time: these are the open ones among the first.
        """
        if not self.superseded_run:
            return []
        done, offsets = self._superseded
        first = range(done + window)
        return [row for row in first if row >= len(offsets) or offsets[row] < 0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.is_new:  # nothing was begun: leave no trace
            self.remove()
        with self._writing():  # what could not be written is tried once more
            self._file.close()

    def remove(self) -> None:
        """Delete the file: the output is complete, or nothing was begun."""
        self.path.unlink(missing_ok=True)

    def _read_header(self) -> Header | None:
        self._end = 0
        line = self._file.readline()
        if not line.endswith(b"\n"):
            self._file.truncate(0)  # torn: nothing was sent under its run id
            return None
        values = _parse(line)
        if values.pop("tokenmill_journal", None) != FORMAT:
            raise OutputError(
                f"{self.path} must be a journal of format {FORMAT}, and is not; "
                "move it away, or give another --output"
            )
        self._end = len(line)
        return Header(**values)

    def _forget(self, header: Header) -> None:
        self._read_answers()
        self.superseded_run = header.run
        self._superseded = (self.answered + self.failed, self._offsets)
        self._offsets = array("q")
        self.answered = self.failed = self._end = 0
        self._file.truncate(0)

    def _check(self, output: Path, digest: str, parameters: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {self.header.parameters.get(name)!r}, is {parameters.get(name)!r}"
            for name in sorted({*self.header.parameters, *parameters})
            if self.header.parameters.get(name) != parameters.get(name)
        ]
        if self.header.input != digest:
            changed.insert(0, "the input file has changed")
        if changed:
            raise OutputError(
                f"{output} was begun with another input or parameters ({'; '.join(changed)}); "
                "go on with what it was, or start anew with --overwrite"
            )

    def _read_answers(self) -> None:
        self._file.seek(self._end)
        for line in self._file:
            values = _parse(line) if line.endswith(b"\n") else {}
            if "row" not in values:
                break
            self._note(Answer(**values), self._end)
            self._end += len(line)
        self._file.truncate(self._end)

    def _note(self, answer: Answer, offset: int) -> None:
        missing = answer.row + 1 - len(self._offsets)
        if missing > 0:
            self._offsets.extend([-1] * missing)
        if self._offsets[answer.row] < 0:
            self.answered += answer.ok
            self.failed += not answer.ok
        self._offsets[answer.row] = offset

    def _write(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        with self._writing():
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        self._end += len(line)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}; run the same command to go on"
            ) from error


def journal_path(output: Path) -> Path:
    """Where the journal of an output file is."""
    return output.with_name(f"{output.name}.journal")


def _open(path: Path, output: Path) -> BinaryIO:
    remedy = "give another --output"
    if output.exists() and not output.is_file():
        raise OutputError(f"output must be a file, got {output}; {remedy}")
    if output.exists() and not os.access(output, os.W_OK):
        raise OutputError(f"output {output} cannot be written: Permission denied; {remedy}")
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        if not output.parent.is_dir():
            remedy = f"create the directory {output.parent}, or {remedy}"
        raise OutputError(
            f"output {output} cannot be written: {error.strerror}; {remedy}"
        ) from error


def _lock(file: BinaryIO, output: Path) -> None:
    text = f"another process is writing {output} right now; wait for it, or give another --output"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held, named = os.fstat(file.fileno()), journal_path(output).stat()
    except (BlockingIOError, FileNotFoundError) as error:
        raise OutputError(text) from error
    if not os.path.samestat(held, named):  # it was removed between our open and our lock
        raise OutputError(text)


def _parse(line: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        values = json.loads(line)
        if isinstance(values, dict):
            return values
    return {}
