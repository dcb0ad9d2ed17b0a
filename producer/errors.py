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


class TokenmillError(Exception):
    """Root of everything tokenmill raises on purpose; its text is meant for the user."""


class InvalidRequest(TokenmillError):
    """A field is out of bounds. `field` is its name as the user wrote it."""

    def __init__(self, field: str, expected: str, got: object, remedy: str = "") -> None:
        try:
            shown = repr(got)
        except (RecursionError, ValueError):  # nested too deeply, or an integer too long to print
            shown = f"a {type(got).__name__}"
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
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
