"""The output file of a run: written at the end in one rename, and recognised when it is there."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenmill.producer.dataset import Dataset, Layout
from tokenmill.producer.journal import OutputError


def failed_rows(dataset: Dataset, output: Path) -> int | None:
    """How many rows of an output of the dataset have failed.

    None if the file is none: that has a row for each row, with its columns.
    """
    failed = 0
    with output.open("rb") as file:
        for row in dataset:
            try:
                written = json.loads(file.readline())
            except ValueError:
                return None
            names = ("custom_id",) if dataset.layout is Layout.OPENAI else tuple(row.columns)
            if not isinstance(written, dict) or any(
                written.get(name) != row.columns.get(name) for name in names
            ):
                return None
            failed += written.get(dataset.error_column) is not None
        return None if file.read(1) else failed


def write_lines(output: Path, lines: Iterator[bytes]) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Raises:
        OutputError: it cannot be written.
    """
    partial = output.with_name(f"{output.name}.partial")
    try:
        with partial.open("wb") as file:
            for line in lines:
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
        folder = os.open(output.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OutputError(
            f"output {output} cannot be written: {error.strerror}; "
            "the answers are kept: mend it and run the same command again"
        ) from error


def json_line(values: Mapping[str, Any]) -> bytes:
    """A row as a line of the output."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(values).encode() + b"\n"
