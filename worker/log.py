"""The worker's log: a vocabulary of events with fields, for people or as JSON lines.

INFO is the life of the worker, DEBUG is per request. Fields are ids, counts and reasons; prompts
and outputs never appear.
"""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

LOGGER = logging.getLogger("tokenmill.worker")


@dataclass(frozen=True, slots=True)
class Event:
    """A name that never changes, its level, and the fields that every record of it has."""

    name: str
    level: int
    fields: tuple[str, ...] = ()


STARTING = Event("worker_starting", logging.INFO, ("worker_id", "redis", "queue", "model"))
READY = Event(
    "worker_ready",
    logging.INFO,
    (
        *("worker_id", "model", "quantization", "kv_cache_dtype"),
        *("load_s", "sequences", "kv_tokens", "max_model_len"),
    ),
)
#: From the process's start on: Python, torch and our modules, then what the engine does.
START_TIMED = Event(
    "start_timed", logging.INFO, ("python_s", "imports_s", "model_s", "kv_cache_s", "steps_s")
)
STEPS_TIMED = Event(
    "steps_timed",
    logging.INFO,
    ("token_budget", "fixed_ms", "token_us", "kv_token_ns", "relative_error"),
)
DRAINING = Event("worker_draining", logging.INFO, ("why",))
DRAIN_CUT = Event("drain_cut_short", logging.WARNING, ("held",))
STOPPED = Event("worker_stopped", logging.INFO, ("finished", "released", "fenced", "uptime_s"))
IDLE = Event("worker_idle", logging.INFO, ("idle_s",))
SERVER_AWAITED = Event("server_awaited", logging.WARNING, ("error",))
SERVER_LOST = Event("server_lost", logging.WARNING, ("error",))
SERVER_BACK = Event("server_back", logging.INFO, ("after_s",))
STEP_FAILED = Event("step_failed", logging.ERROR, ("error", "sequences"))
THREAD_FAILED = Event("thread_failed", logging.ERROR, ("thread", "error"))
REAPED = Event("reaped", logging.INFO, ("requests",))
DISOWNED = Event("disowned", logging.WARNING, ("requests",))

_REQUEST = ("request_id", "epoch")
CLAIMED = Event(
    "request_claimed", logging.DEBUG, (*_REQUEST, "attempts", "prompt_tokens", "committed")
)
FINISHED = Event("request_finished", logging.DEBUG, (*_REQUEST, "finish_reason", "tokens"))
FENCED = Event("request_fenced", logging.DEBUG, _REQUEST)
GAP = Event("request_gap", logging.DEBUG, (*_REQUEST, "start"))
REFUSED = Event("request_refused", logging.ERROR, (*_REQUEST, "reason"))
RELEASED = Event("request_released", logging.DEBUG, (*_REQUEST, "undo", "reason"))


def emit(event: Event, **fields: object) -> None:
    """Log an event.

    Raises:
        ValueError: the fields are not those of the event.
    """
    if fields.keys() != set(event.fields):
        raise ValueError(f"{event.name} has the fields {event.fields}, got {tuple(fields)}")
    if LOGGER.isEnabledFor(event.level):
        LOGGER.log(event.level, event.name, extra={"fields": fields})


def configure(*, as_json: bool, level: int, stream: TextIO | None = None) -> None:
    """Send events, and other libraries' warnings, to `stream` (standard error), one line each."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else HumanFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    LOGGER.setLevel(level)


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": ..., "event": ..., fields...}`: one object a line."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in _fields(record).items()},
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


class HumanFormatter(logging.Formatter):
    """`12:00:00 worker ready  model=... ...`, for people."""

    default_time_format = "%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        name = record.getMessage()
        text = name.replace("_", " ") if fields or record.name == LOGGER.name else name
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname}: {text}"
        shown = "  ".join(f"{key}={_shown(value)}" for key, value in fields.items())
        line = f"{self.formatTime(record, self.default_time_format)} {text}  {shown}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)
