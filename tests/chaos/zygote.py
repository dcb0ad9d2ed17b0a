"""`Zygote`: a process that has imported everything and forks workers, producers and readers.

Importing the engine takes seconds, a fork takes milliseconds: hundreds of processes can be killed
in minutes. It runs one thread and computes nothing, so that its children may start their own.
Whoever has died stays a zombie entry until it is waited for, so that no process id is used twice
while somebody may still send signals to it.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
RIG = HERE.parent / "rig"


class Child:
    """A forked process."""

    def __init__(self, zygote: "Zygote", pid: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has died."""
        if self._status is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def poll(self, timeout_s: float = 0.0) -> int | None:
        """Its exit status, minus the signal if one killed it; None while it lives."""
        if self._status is None and select.select([self._pidfd], [], [], timeout_s)[0]:
            self._status = self._zygote.ask({"wait": self.pid})
            os.close(self._pidfd)
        return self._status


class Zygote:
    """Use it in a `with`; what was forked and still lives then is killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._children: list[Child] = []

    def prepare(self, call: str, **options: Any) -> None:
        """Run a function, named `module.function`, in the zygote: its children find it done."""
        self.ask({"role": call, "options": options})

    def fork(self, role: str, log: Path, **options: Any) -> Child:
        """Run a function, named `module.function`, in a new process that writes to `log`."""
        pid = self.ask({"role": role, "log": str(log), "options": options})
        self._children.append(Child(self, pid))
        return self._children[-1]

    def ask(self, command: Mapping[str, Any]) -> int:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(command).encode() + b"\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send(signal.SIGKILL)
                child.poll(10.0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10.0)
        self._process.stdout.close()


def _serve() -> None:
    importlib.import_module("roles")
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        module, _, name = command["role"].rpartition(".")
        call = getattr(importlib.import_module(module), name)
        if "log" in command:
            print(_fork(call, command["log"], command["options"]), flush=True)
        else:
            print(call(**command["options"]), flush=True)


def _fork(call: Callable[..., int], log: str, options: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number, target in ((null, 0), (file, 1), (file, 2)):
            os.dup2(number, target)
        sys.stdin = os.fdopen(0, "r")
        status = call(**options)
    except BaseException:  # noqa: BLE001 - a child must never go on as the zygote
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(RIG)]
    _serve()
