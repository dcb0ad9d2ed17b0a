"""`Worker`: engine, threads and server wired together, and the order in which they stop.

On the first SIGTERM or Ctrl-C:

    1. the loop ends after the step it is in      nothing is generated any more
    2. intake ends                                nothing is claimed any more
    3. the publisher writes what is unsent, and releases what has not ended, uncounted
    4. the registration is taken back, and whatever is left is parked
    5. the engine is closed                       nothing is compiled or computed any more

So another worker goes on within seconds, at the exact token. If the server does not answer, the
drain is cut short and leases do the rest.
"""

import gc
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

from redis.exceptions import NoPermissionError, RedisError

from tokenmill.producer.address import shown_url
from tokenmill.producer.errors import ServerUnreachable, TokenmillError, WrongServer
from tokenmill.producer.refusals import is_about_the_server
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import WorkerInfo
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.health import HealthServer, Pulse
from tokenmill.worker.inbox import Inbox
from tokenmill.worker.intake import Intake
from tokenmill.worker.log import (
    DRAIN_CUT,
    DRAINING,
    LOGGER,
    READY,
    SERVER_AWAITED,
    START_TIMED,
    STARTING,
    STEPS_TIMED,
    STOPPED,
    THREAD_FAILED,
    emit,
)
from tokenmill.worker.loop import EngineLike, Loop
from tokenmill.worker.outage import Outage
from tokenmill.worker.publisher import Publisher
from tokenmill.worker.shards import queue_of
from tokenmill.worker.signals import StopSignals, exit_status

#: The loop gives up the interpreter lock in every tensor operation, and beside a busy thread waits
#: up to this long to get it back: with Python's 5 ms, 300 small operations took 7 times as long.
SWITCH_INTERVAL_S = 0.0005
#: Longest that intake may take to end; a claim that is answered later is parked by step 4.
_INTAKE_STOP_S = 1.0
#: Between two tries to reach a server that was not there when the worker was started.
RETRY_S = 1.0


def load_engine(config: WorkerConfig) -> EngineLike:
    """The real engine of a configuration.

    Raises:
        ModelNotFound, UnsupportedModel, OutOfMemory, InvalidRequest, GroupLost: as for
            `start_engine`.
    """
    python_s, began = process_age_s(), time.monotonic()
    from tokenmill.engine.start import start_engine

    imports_s = time.monotonic() - began
    engine = start_engine(
        config.model,
        config.engine,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        threads=config.threads,
    )
    seconds = engine.start_times.seconds
    emit(
        START_TIMED,
        python_s=python_s,
        imports_s=imports_s,
        model_s=seconds["model"],
        kv_cache_s=seconds["kv_cache"],
        steps_s=seconds["steps"],
    )
    stats = engine.stats()
    if stats.cost.num_steps:
        emit(
            STEPS_TIMED,
            token_budget=stats.token_budget,
            fixed_ms=round(1e3 * stats.cost.fixed_s, 2),
            token_us=round(1e6 * stats.cost.token_s, 1),
            kv_token_ns=round(1e9 * stats.cost.kv_token_s, 1),
            relative_error=round(stats.cost.relative_error, 3),
        )
    return engine


def process_age_s() -> float | None:
    """Seconds since this process was started; None where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after boot: `man 5 proc`
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return None


def run(
    config: WorkerConfig,
    *,
    make_engine: Callable[[WorkerConfig], EngineLike] = load_engine,
    waits_for_server: bool = False,
) -> int:
    """Run a worker in this process until it is told to stop; returns the exit status.

    `waits_for_server`: a server that does not answer yet is no error, and the model is loaded
    meanwhile. It suits workers that are started together with their server.

    Raises:
        ServerUnreachable, WrongServer: the server cannot be used.
        EngineFailed, GroupLost, WorkerFailed: as for `Worker.run`.
        TokenmillError: what `make_engine` raises.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        began = time.monotonic()
        worker_id = f"{platform.node() or 'worker'}-{os.getpid()}-{secrets.token_hex(4)}"
        emit(
            STARTING,
            worker_id=worker_id,
            redis=shown_url(config.redis_url),
            queue=config.queue,
            model=config.model,
        )
        # Before the model is loaded, which takes longer than finding a wrong address.
        shards = _connected(config, waits=waits_for_server)
        pulse, is_loaded = Pulse(config.stall_limit_s), threading.Event()
        worker: Worker | None = None
        if config.health_port is not None:
            health = HealthServer(
                config.health_port,
                pulse,
                is_started=is_loaded.is_set,
                is_ready=lambda: worker is not None and worker.is_ready,
            )
            stack.enter_context(health)
        engine = make_engine(config)
        # What is loaded by now stays: a full collection would look at all of it, for 0.1 s, while
        # no step is made.
        gc.collect()
        gc.freeze()
        is_loaded.set()
        while shards is None:  # a signal ends the process: there is nothing to put in order
            time.sleep(RETRY_S)
            shards = _connected(config, waits=True, is_first=False)
        stack.callback(shards.close)
        worker = Worker(config, worker_id, shards, pulse)
        signals.on_stop(worker.stop)
        worker.run(engine, load_s=time.monotonic() - began)
        return exit_status(signals.received)


def _connected(config: WorkerConfig, *, waits: bool, is_first: bool = True) -> Shards | None:
    """The shards; None if a server does not answer and that is to be waited for, said once."""
    try:
        return Shards(config.redis_url, config.queue)
    except ServerUnreachable as error:
        if not waits:
            raise
        if is_first:
            emit(SERVER_AWAITED, error=str(error))
        return None


class Worker:
    """One worker; `run` blocks the main thread, `stop` ends it from any other."""

    def __init__(
        self,
        config: WorkerConfig,
        worker_id: str,
        shards: Shards,
        pulse: Pulse | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.inbox = Inbox()
        self.pulse = pulse or Pulse(config.stall_limit_s)
        self.queue = queue_of(shards, worker_id, lease_ms=config.lease_ms)
        self.outage = Outage(
            is_whole=lambda: self.queue.is_whole,
            is_partial=lambda: self.queue.is_reachable_in_part,
        )
        self._config = config
        self._adapters = tuple(sorted(config.engine.lora))
        self._is_registered = False
        self._failure: BaseException | None = None

    @property
    def is_ready(self) -> bool:
        """Model loaded, registered, server answering."""
        return self._is_registered and not self.outage.is_on

    def stop(self, why: signal.Signals | None = None) -> None:
        """Stop in order, as on SIGTERM."""
        emit(DRAINING, why=why.name if why else "asked to")
        self.inbox.stop()

    def run(self, engine: EngineLike, *, load_s: float = 0.0) -> None:
        """Serve until stopped.

        Raises:
            WrongServer: the server refuses to register a worker.
            EngineFailed: steps failed repeatedly; everything was released before.
            GroupLost: a rank has gone; likewise.
            WorkerFailed: a thread ended unexpectedly; likewise.
        """
        started = time.monotonic()
        publisher = Publisher(
            self.queue, self.inbox, self.outage, is_alive=lambda: self.pulse.is_alive
        )
        intake = Intake(
            self.queue,
            self.inbox,
            publisher,
            self.outage,
            tokenizer=engine.tokenizer,
            model=engine.model_name,
            adapters=self._adapters,
            exit_when_idle_s=self._config.exit_when_idle_s,
            is_alive=lambda: self.pulse.is_alive,
        )
        self._register(engine, load_s)
        self.pulse.beat()
        threads = [
            self._start("intake", intake.run),
            self._start("publisher", publisher.run),
        ]
        try:
            Loop(engine, self.inbox, intake, publisher, self.pulse).run()
        finally:
            self._drain(intake, publisher, *threads)
            engine.close()
            emit(
                STOPPED,
                finished=publisher.num_finished,
                released=publisher.num_released,
                fenced=publisher.num_dropped,
                uptime_s=time.monotonic() - started,
            )
        if self._failure is not None:
            raise WorkerFailed(
                f"a thread of the worker ended: {_told(self._failure)}"
            ) from self._failure

    def _register(self, engine: EngineLike, load_s: float) -> None:
        info = WorkerInfo(
            worker_id=self.worker_id,
            model=engine.model_name,
            host=platform.node(),
            pid=os.getpid(),
            started_ms=int(time.time() * 1000),
            version=version("tokenmill"),
            adapters=self._adapters,
            quantization=engine.quantization,
            kv_cache_dtype=engine.kv_cache_dtype,
        )
        while not self._try_register(info):
            pass
        if not self._is_registered:
            return
        capacity = engine.capacity()
        emit(
            READY,
            worker_id=self.worker_id,
            model=engine.model_name,
            quantization=engine.quantization,
            kv_cache_dtype=engine.kv_cache_dtype,
            load_s=load_s,
            sequences=capacity.sequences,
            kv_tokens=capacity.blocks * capacity.block_size,
            max_model_len=engine.max_model_len,
        )

    def _try_register(self, info: WorkerInfo) -> bool:
        """False: the server was lost while the model was loaded; try again."""
        try:
            self.queue.register(info)
        except RedisError as error:
            if is_about_the_server(error) and not isinstance(error, NoPermissionError):
                return self.inbox.take(self.outage.lost(error)).is_stopping
            remedy = "give this user the rights of a worker"
            raise WrongServer(f"the server refuses a worker: {error}; {remedy}") from error
        self.outage.back()
        self._is_registered = True
        return True

    def _start(self, name: str, target: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                target()
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - the others would wait for it for ever
                LOGGER.debug("traceback", exc_info=True)
                emit(THREAD_FAILED, thread=name, error=_told(error))
                self._failure = error
                self.inbox.stop()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _drain(
        self,
        intake: Intake,
        publisher: Publisher,
        intake_thread: threading.Thread,
        publisher_thread: threading.Thread,
    ) -> None:
        self._is_registered = False
        ends_at = time.monotonic() + self._config.drain_s
        intake.stop()
        self._wake_intake()
        intake_thread.join(min(_INTAKE_STOP_S, self._config.drain_s))
        publisher.drain()
        publisher_thread.join(max(ends_at - time.monotonic(), 0.0))
        publisher.abandon()
        if publisher_thread.is_alive() or self.outage.is_on:
            emit(DRAIN_CUT, held=publisher.num_held)
            return
        try:
            self.queue.retire()
        except RedisError:
            emit(DRAIN_CUT, held=publisher.num_held)

    def _wake_intake(self) -> None:
        """End the read that an idle intake sleeps in; other workers look for work once more."""
        if self.outage.is_on:  # it does not sleep there, and this would only wait
            return
        with suppress(RedisError):
            self.queue.wake()


def _told(error: BaseException) -> str:
    """Of a panic in Rust, which is no `Exception`, the name: it may quote the text it met."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, Exception) else name


class WorkerFailed(TokenmillError):
    """A thread of the worker ended by itself: a bug."""
