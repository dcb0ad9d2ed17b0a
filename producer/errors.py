"""The errors a user of tokenmill can meet, each with name, expected, got and remedy.

TokenmillError
|-- InvalidRequest        a field of a request is out of bounds; `field` names it
|   `-- Conflict          the id exists with another payload
|-- Busy                  the queue is full; `retry_after_s` says when to try again
|-- NotFound              no such request, or its result has expired
|-- OutputChanged         what was read of a request is not what the server has now
|-- RequestFailed         a request ended in error, cancelled or expired
|-- ServerUnreachable     the Redis server does not answer
`-- WrongServer           something answers, but not a Redis >= 7 that we may use
"""

import re
from collections.abc import Sized

#: Fields whose content is a prompt, or a user's in another way: of a bad value, type and length are
#: told. An error is kept with the request, listed among the dead letters and written to logs.
_PRIVATE = re.compile(
    r"(body\.)?(prompt|messages|input|tools|metadata|stop|regex|choice|json_schema|response_format"
    r"|line|json|msgpack|payload)(?![A-Za-z0-9_])"
)


class TokenmillError(Exception):
    """Root of everything tokenmill raises on purpose; its text is meant for the user."""


class Words(str):
    """What was got, in words of our own: shown for every field, and as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class InvalidRequest(TokenmillError):
    """A field is out of bounds. `field` is its name as the user wrote it.

    What was got is shown, but of a prompt, metadata and other texts only its type and length.
    """

    def __init__(self, field: str, expected: str, got: object, remedy: str = "") -> None:
        shown = _outline(got) if _PRIVATE.match(field) else _shown(got)
        # Names come from outside too: whatever they hold must be fit to be sent and printed.
        field = field[:100].encode("utf-8", "backslashreplace").decode() or "''"
        text = f"{field} must be {expected}, got {shown}"
        super().__init__(f"{text}; {remedy}" if remedy else text)
        self.field = field


class Conflict(InvalidRequest):
    """The request id is taken by a request with another payload."""


class Busy(TokenmillError):
    """The queue is full: nothing was enqueued; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotFound(TokenmillError):
    """No request of that id is known: a wrong id, another queue, or its result has expired."""

    def __init__(self, message: str, request_id: str = "") -> None:
        super().__init__(message)
        self.request_id = request_id


class OutputChanged(TokenmillError):
    """The server lost part of an output, and it was generated again otherwise: read it anew."""

    def __init__(self, request_id: str, position: int) -> None:
        text = f"the output of request {request_id} is not what was read up to token {position}"
        remedy = "the server has lost part of it; read it again from token 0"
        super().__init__(f"{text}; {remedy}")
        self.request_id = request_id


class RequestFailed(TokenmillError):
    """A request ended without an answer; `reason` is the worker's word for it."""

    def __init__(self, request_id: str, finish_reason: str, reason: str) -> None:
        super().__init__(f"request {request_id} ended as {finish_reason}: {reason}")
        self.request_id = request_id
        self.finish_reason = finish_reason
        self.reason = reason


class ServerUnreachable(TokenmillError):
    """The Redis server does not answer."""


class WrongServer(TokenmillError):
    """Something answers at the address, but not a Redis >= 7 (or Valkey) that we may use."""


def _shown(got: object) -> str:
    try:
        shown = repr(got)
    except (RecursionError, ValueError):  # nested too deeply, or an integer too long to print
        shown = f"a {type(got).__name__}"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _outline(got: object) -> str:
    """Type and length; numbers, and what is our own, as they are."""
    if got is None or isinstance(got, Words | bool | int | float):
        return _shown(got)
    name = type(got).__name__
    if isinstance(got, str):
        return f"text of {len(got)} characters"
    return f"{name} of length {len(got)}" if isinstance(got, Sized) else f"a {name}"
