"""`LocalWorker`: a worker that a command brings along as its child, and takes with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tokenmill.producer.embedded import state_dir
from tokenmill.producer.errors import TokenmillError
from tokenmill.producer.wire import WorkerInfo

#: In the child's environment: end when this process ends, however it does.
PARENT = "TOKENMILL_PARENT_PID"
STOP_TIMEOUT_S = 30.0
#: Logs of workers that failed, or whose command was killed, are kept so long.
KEEP_LOGS_S = 7 * 86_400
_SHOWN_LINES = 5


class WorkerEnded(TokenmillError):
    """The worker that this command brought along has ended by itself."""


class LocalWorker:
    """A worker process for one model on one queue; its log is in the state directory.

    `lora`: its adapters, each as NAME=DIRECTORY.
    """

    def __init__(
        self,
        model: str,
        *,
        url: str,
        queue: str,
        quantization: str = "",
        kv_cache_dtype: str = "",
        lora: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.log = state_dir() / f"worker-{os.getpid()}.log"
        for old in self.log.parent.glob("worker-*.log"):
            if time.time() - old.stat().st_mtime > KEEP_LOGS_S:
                old.unlink(missing_ok=True)
        with self.log.open("wb") as output:
            # Its own process group: Ctrl-C reaches this process alone, which then ends it in order.
            self._process = subprocess.Popen(
                _command(
                    worker_options(
                        model, quantization=quantization, kv_cache_dtype=kv_cache_dtype, lora=lora
                    ),
                    url,
                    queue,
                ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                env=os.environ | {PARENT: str(os.getpid())},
            )

    def check(self) -> None:
        """Whether it runs.

        Raises:
            WorkerEnded: it does not; the text has its last words.
        """
        status = self._process.poll()
        if status is not None:
            lines = _last_lines(self.log)
            said = f": {lines[-1]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
            raise WorkerEnded(
                f"the worker for {self.model} ended with status {status}{said}\n"
                f"its log is {self.log}; run the same command again to go on"
            )

    def stop(self) -> None:
        """End it in order and wait; kill it when it does not end, or on a second Ctrl-C."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self._process.kill()
                self._process.wait()
        if self._process.returncode in (0, -signal.SIGTERM, -signal.SIGKILL):
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


def end_with_parent() -> None:
    """In a process that a `LocalWorker` started: end in order when its parent is gone (Linux)."""
    parent = os.environ.pop(PARENT, "")
    if not parent.isdecimal() or sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(parent):  # it went before we asked
        sys.exit(0)


def is_alive(worker: WorkerInfo) -> bool:
    """False for a worker of this machine that is gone, though its lease has not run out yet."""
    if worker.host != socket.gethostname():
        return True
    try:
        os.kill(worker.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def worker_options(
    model: str, *, quantization: str = "", kv_cache_dtype: str = "", lora: Sequence[str] = ()
) -> list[str]:
    """What `tokenmill worker` is started with for a model; "" is its own choice."""
    adapters = [word for text in lora for word in ("--lora", text)]
    chosen = ["--quantization", quantization] if quantization else []
    if kv_cache_dtype:
        chosen += ["--kv-cache-dtype", kv_cache_dtype]
    return ["--model", model, *chosen, *adapters]


def _command(options: Sequence[str], url: str, queue: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "tokenmill.producer.cli", "worker"]
    return [*command, *options, "--redis", url, "--queue", queue]


def _last_lines(log: Path) -> list[str]:
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines()]
    return [line for line in lines if line.strip()][-_SHOWN_LINES:]
