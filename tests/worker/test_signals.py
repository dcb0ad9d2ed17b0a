"""What the first and the second signal do, in a process of its own."""

import signal
import subprocess
import sys

import pytest

BEFORE = """
import time
from tokenmill.worker.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    time.sleep(60)
"""
#: A signal comes at the instant at which the handler is in place.
AT_ONCE = """
import os, signal, time
from tokenmill.worker.signals import StopSignals
install = signal.signal
def install_and_be_hit(number, handler):
    before = install(number, handler)
    os.kill(os.getpid(), number)
    return before
signal.signal = install_and_be_hit
print("ready", flush=True)
with StopSignals():
    time.sleep(60)
"""
SERVING = """
import threading
from tokenmill.worker.signals import StopSignals, exit_status
stopping = threading.Event()
def stop(received):
    print(received.name, flush=True)
    {reaction}
with StopSignals() as signals:
    signals.on_stop(stop)
    print("ready", flush=True)
    stopping.wait(60)
raise SystemExit(exit_status(signals.received))
"""


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_before_there_is_anything_to_put_in_order_it_leaves(
    number: signal.Signals, status: int
) -> None:
    with start(BEFORE) as process:
        process.send_signal(number)
        assert process.wait(10) == status


def test_a_signal_is_not_lost_while_the_handlers_are_set_up() -> None:
    with start(AT_ONCE) as process:
        # Both are hit; the second may already quit.
        assert process.wait(10) in (0, 130, 128 + signal.SIGINT)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_first_signal_stops_in_order(number: signal.Signals, status: int) -> None:
    with start(SERVING.format(reaction="stopping.set()")) as process:
        process.send_signal(number)
        assert process.wait(10) == status
        assert process.stdout is not None
        assert process.stdout.read() == f"{number.name}\n"


def test_a_second_signal_quits_at_once() -> None:
    with start(SERVING.format(reaction="pass")) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "SIGTERM\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
