"""`Script`: one atomic operation on one shard, written in Lua beside the package that calls it."""

from collections.abc import Generator, Iterable
from importlib import resources
from typing import Any

import redis
from redis.exceptions import NoScriptError

from tokenmill.producer.steps import Call, run

SHEBANG = "#!lua"
_INCLUDE = "-- @include "


class Script:
    """A script of a package's `lua` folder: EVALSHA, and EVAL where the server has not seen it.

    `-- @include name` is replaced by that file of the producer's `lua` folder. The only declared
    key is the tag of the shard; all others are derived from it and share its slot.
    """

    def __init__(self, package: str, name: str) -> None:
        self.name = name
        self.source = _source(package, name)
        #: Set by the server's answer to the first call, so that no hash is computed twice.
        self._sha = ""

    def __call__(
        self, server: redis.Redis, tag: str, arguments: Iterable[str | bytes | float]
    ) -> Any:
        """Run it on the shard of `tag`; what it returns is described in its header."""
        steps = self.steps(0, tag, arguments)
        return run(steps, lambda call: getattr(server, call.method)(*call.arguments))

    def steps(
        self, shard: int, tag: str, arguments: Iterable[str | bytes | float]
    ) -> Generator[Call, Any, Any]:
        """The same, as steps."""
        given = tuple(arguments)
        if not self._sha:
            self._sha = _text((yield Call(shard, "script_load", (self.source,))))
        try:
            return (yield Call(shard, "execute_command", ("EVALSHA", self._sha, 1, tag, *given)))
        except NoScriptError:  # the server was restarted or its scripts were flushed
            return (yield Call(shard, "execute_command", ("EVAL", self.source, 1, tag, *given)))


def _source(package: str, name: str) -> str:
    text = _read(package, name)
    if not text.startswith(SHEBANG):
        raise ValueError(f"{name}.lua must begin with {SHEBANG}, got {text[:20]!r}")
    lines = (
        _read("tokenmill.producer", line.removeprefix(_INCLUDE))
        if line.startswith(_INCLUDE)
        else line
        for line in text.splitlines()
    )
    return "\n".join(lines) + "\n"


def _read(package: str, name: str) -> str:
    return (resources.files(package) / "lua" / f"{name}.lua").read_text("utf-8")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
