import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import redis

from tokenmill.producer import connection as connection_module
from tokenmill.producer.connection import MAX_BLOCK_S, connect
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable, WrongServer


@pytest.fixture
def answering() -> Iterator[Callable[[bytes], str]]:
    """`answering(reply)` listens on a port and gives everyone that reply; returns its URL."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(listener: socket.socket, reply: bytes) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(10_000):
                    resp = reply[:1] in b"*-"
                    for command in data.split(b"*")[1:]:
                        connection.sendall(b"+OK\r\n" if resp and b"CLIENT" in command else reply)
                    if not resp:
                        break

    def start(reply: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=serve, args=(listener, reply))
        thread.start()
        listeners.append(listener)
        threads.append(thread)
        return f"redis://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join()


def test_connects_and_blocks_longer_than_a_read(server_url: str) -> None:
    with connect(server_url) as server:
        assert server.ping()
    with connect(server_url, blocking=True) as blocking:
        assert blocking.connection_pool.connection_kwargs["socket_timeout"] > MAX_BLOCK_S
        assert blocking.xread({"nothing": "0"}, block=10) == []


@pytest.mark.parametrize(
    "url", ["http://h", "localhost:6379", "redis+sentinel://h", "", "redis://[x", "redis://a,b"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="redis url must be"):
        connect(url)


def test_nothing_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerUnreachable, match="no Redis server answers at redis://127"):
        connect(f"redis://127.0.0.1:{port}")
    with pytest.raises(ServerUnreachable, match="TOKENMILL_REDIS_URL"):
        connect("unix:///nonexistent/socket")


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a Redis"),
        (b"SSH-2.0-OpenSSH_9.0\r\n", "not a Redis"),
        (b"-ERR unknown command 'HELLO'\r\n", "not a Redis"),
        (
            b"*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n6.2.14\r\n",
            "got redis 6.2.14",
        ),
        (
            (
                b"*6\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n7.4.0\r\n"
                b"$4\r\nmode\r\n$7\r\ncluster\r\n"
            ),
            "is a node of a cluster",
        ),
        (b"-NOAUTH Authentication required.\r\n", "put user and password"),
    ],
)
def test_something_else_there(answering: Callable[[bytes], str], reply: bytes, says: str) -> None:
    with pytest.raises(WrongServer, match=says):
        connect(answering(reply))


def test_a_password_is_asked_for_and_never_shown(server: redis.Redis, server_url: str) -> None:
    server.config_set("requirepass", "hunter2")
    try:
        with pytest.raises(WrongServer, match="put user and password"):
            connect(server_url)
        with pytest.raises(WrongServer, match="refuses us") as caught:
            connect(server_url.replace("unix://", "unix://:wrong1@"))
        assert "wrong1" not in str(caught.value)
        with connect(server_url.replace("unix://", "unix://:hunter2@")) as allowed:
            assert allowed.ping()
    finally:
        with connect(server_url.replace("unix://", "unix://:hunter2@")) as allowed:
            allowed.config_set("requirepass", "")


def test_a_port_that_stays_silent_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_HELLO_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ServerUnreachable, match="no Redis server answers"):
            connect(f"redis://127.0.0.1:{silent.getsockname()[1]}")
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # it was tried once
            silent.accept()
