"""`SentRow`: a row of a dataset run on its way, and the id of its request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenmill.producer.dataset import Row
from tokenmill.producer.wire import Request


def request_id(run: str, row: int, shards: int) -> str:
    """The id of a row's request: the same for every attempt at the same run."""
    return f"{row % shards}.{run}-{row:012d}"


def row_of(request_id: str) -> int:
    """The row of such an id."""
    return int(request_id.rpartition("-")[2])


@dataclass(slots=True, kw_only=True)
class SentRow:
    """A row that was sent, or is about to be, and what came of it."""

    row: Row
    request: Request
    parts: list[str] = field(default_factory=list)
    tokens: int = 0
    #: Characters shown already, before the output was read anew.
    shown: int = 0


def title(prompt: Any) -> str:
    """What names a prompt to the user: its text, or that of its last message."""
    last = prompt[-1] if isinstance(prompt, list) else prompt
    content = last.get("content") if isinstance(last, Mapping) else last
    return content if isinstance(content, str) else f"{len(prompt)} token ids"
