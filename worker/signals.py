"""`StopSignals`: SIGTERM and SIGINT, heard by a thread.

A Python signal handler runs between two bytecodes of the main thread, which may be deep in a
forward pass. The interpreter's wake-up descriptor is written at once, and the thread that reads it
can always act: the first signal stops the worker in order, a second one quits at once, and what
the worker holds goes to others when its lease runs out.
"""

import os
import signal
import threading
from collections.abc import Callable
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Use it in a `with`, on the main thread."""

    def __init__(self) -> None:
        #: The signal that asked for the stop.
        self.received: signal.Signals | None = None
        self._on_stop: Callable[[signal.Signals], None] = _leave
        self._lock = threading.Lock()

    def on_stop(self, call: Callable[[signal.Signals], None]) -> None:
        """From now on the first signal calls this; until now there was nothing to put in order."""
        with self._lock:
            self._on_stop = call

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # Before the handlers: a signal between the two would be heard by nobody.
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # the thread reads the end of file
        self._thread.join()
        os.close(self._read_end)

    def _listen(self) -> None:
        while number := os.read(self._read_end, 1):
            if number[0] not in SIGNALS:
                continue
            received = signal.Signals(number[0])
            if self.received is not None:
                os._exit(128 + received)
            self.received = received
            with self._lock:
                self._on_stop(received)


def exit_status(received: signal.Signals | None) -> int:
    """0 after SIGTERM, which is how workers end; 130 after Ctrl-C, as shells expect."""
    return 130 if received is signal.SIGINT else 0


def _leave(received: signal.Signals) -> None:
    os._exit(exit_status(received))


def _ignore(_number: int, _frame: object) -> None:
    """The thread does it; without a handler the process would end."""
