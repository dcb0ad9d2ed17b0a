"""`Script`: one atomic operation on one shard, written in Lua beside the package that calls it."""

from collections.abc import Iterable
from importlib import resources
from typing import Any

import redis
from redis.exceptions import NoScriptError

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
        given = tuple(arguments)
        call: Any = server.execute_command
        if not self._sha:
            self._sha = _text(server.script_load(self.source))
        try:
            return call("EVALSHA", self._sha, 1, tag, *given)
        except NoScriptError:  # the server was restarted or its scripts were flushed
            return call("EVAL", self.source, 1, tag, *given)


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
