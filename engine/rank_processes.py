"""`RankProcesses`: the other ranks of a group, as children of this process. No torch.

    stdin of a rank    its settings as JSON, then messages; each behind its length, 4 bytes
    stdout             a line of JSON: {"ready": true} when its part is loaded, {"error": ...}
    stderr             this process's own

Nothing listens on a network for them. A rank ends by itself when its stdin does, so that none
outlives this process however it dies; when a rank dies, this process kills the rest of them.
"""

import contextlib
import fcntl
import json
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from tokenmill.engine.errors import GroupLost

#: Room of a pipe, so that a step is written without waiting for its reader.
_PIPE_BYTES = 1 << 20
#: For ranks to end by themselves before they are killed.
_END_S = 5.0
LENGTH = struct.Struct("<I")


class RankProcesses:
    """Started on construction, rank 1 with the first of `settings`; `end` ends them."""

    def __init__(
        self, settings: Sequence[Mapping[str, object]], on_lost: Callable[[], None]
    ) -> None:
        """`on_lost` is called once, from any thread, when a rank has gone."""
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._num_ready = 0
        self._lost = ""
        self._is_ending = False
        #: When the step began that runs; None between steps.
        self._step_began_at: float | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watchers: list[threading.Thread] = []
        try:
            for rank, own in enumerate(settings, start=1):
                self._start(rank, own)
        except BaseException:
            self.end()
            raise

    def _start(self, rank: int, settings: Mapping[str, object]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tokenmill.engine.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # Ctrl-C is for this process alone, which ends them in order
        )
        self._processes.append(process)
        with contextlib.suppress(OSError):  # not more than the system allows
            fcntl.fcntl(_end_of(process.stdin), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        watcher = threading.Thread(
            target=self._watch, args=(rank, process), name=f"rank {rank}", daemon=True
        )
        self._watchers.append(watcher)
        watcher.start()
        with contextlib.suppress(BrokenPipeError):  # the watcher says how it ended
            _write(_end_of(process.stdin), json.dumps(settings).encode())

    def wait_ready(self) -> None:
        """Wait until all have loaded their parts.

        Raises:
            GroupLost: one has ended instead.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lost or self._num_ready == len(self._processes))
        self.check()

    def check(self) -> None:
        """All are there.

        Raises:
            GroupLost: one has ended.
        """
        if self._lost:
            raise GroupLost(f"a rank of the tensor-parallel group is gone: {self._lost}")

    def watch(self, limit_s: float) -> None:
        """From now on all are lost with a step that takes longer: one hangs, or was stopped."""
        watcher = threading.Thread(
            target=self._watch_steps, args=(limit_s,), name="steps of ranks", daemon=True
        )
        self._watchers.append(watcher)
        watcher.start()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what is watched."""
        self._step_began_at = time.monotonic()
        try:
            yield
        finally:
            self._step_began_at = None

    def send(self, message: bytes) -> None:
        """To all of them.

        Raises:
            OSError: one has ended.
        """
        for process in self._processes:
            _write(_end_of(process.stdin), message)

    def give_up(self, otherwise: str, within_s: float) -> None:
        """They are out of step: if none has ended by then, that is the reason; all are killed."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost, within_s)
        self._lose(otherwise)

    def end(self) -> None:
        """Let them end; kill those that do not."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):
                _end_of(process.stdin).close()
        ends_at = time.monotonic() + _END_S
        for process in self._processes:
            try:
                process.wait(max(ends_at - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
        for watcher in self._watchers:
            watcher.join()

    def _watch_steps(self, limit_s: float) -> None:
        age_s = 0.0
        while age_s < limit_s:
            with self._changed:
                if self._changed.wait_for(lambda: self._lost or self._is_ending, limit_s / 16):
                    return
            began_at = self._step_began_at
            age_s = 0.0 if began_at is None else time.monotonic() - began_at
        self._lose(f"a step took longer than {limit_s:g} s")

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        error = ""
        with _end_of(process.stdout) as told:
            for line in told:
                said = json.loads(line)
                error = said.get("error", "")
                with self._changed:
                    self._num_ready += "ready" in said
                    self._changed.notify_all()
        how = _how(process.wait())
        self._lose(f"rank {rank} failed: {error}" if error else f"rank {rank} {how}")

    def _lose(self, why: str) -> None:
        with self._changed:
            if self._lost or self._is_ending:
                return
            self._lost = why
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        self._on_lost()


def _end_of(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("a rank must be started with pipes")
    return pipe


def _write(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(LENGTH.pack(len(message)) + message)
    pipe.flush()


def _how(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
