"""Sentinels, clusters and TLS as a connection meets them: what is found, and what is said."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from servers import SERVICE, Certificates, Cluster, Replicated, Server, free_ports, running
from tokenmill.producer import connection as connection_module
from tokenmill.producer import route
from tokenmill.producer.async_client import AsyncClient
from tokenmill.producer.connection import Connector, connect
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable, WrongServer
from tokenmill.producer.route import key_slot


@pytest.fixture
def server_sentinels(_servers: Any, server_kind: str) -> Replicated:
    shared: Replicated = _servers(f"{server_kind}-sentinel")
    return shared


@pytest.fixture(params=[False, True], ids=["", "asks-clients"])
def tls_server(
    certificates: Certificates, request: pytest.FixtureRequest, server_kind: str
) -> Iterator[Server]:
    if server_kind != "redis":
        pytest.skip("the Valkey of the wheel is built without TLS")
    port = free_ports(1)[0]
    options = certificates.options(asks_clients=request.param)
    with running("redis", "--tls-port", str(port), *options) as server:
        server.port = port
        yield server


def test_slots_are_those_of_the_server(server_cluster: Cluster) -> None:
    with server_cluster.servers[0].admin() as node:
        call: Any = node.execute_command
        for key in ("", "x", "{default:0}", "{default:7}:r:1", "a{b}c", "{}x", "{x", "ü"):
            assert key_slot(key) == call("CLUSTER", "KEYSLOT", key)


def test_a_key_leads_to_its_node(server_cluster: Cluster) -> None:
    connector = Connector(server_cluster.url)
    ports = set()
    for shard in range(8):
        key = f"{{default:{shard}}}:x"
        with connector.connect(key=key) as node:
            node.set(key, shard)
            ports.add(port_of(node))
        with connector.connect(key=key, blocking=True) as node:
            assert node.get(key) == str(shard).encode()
    assert ports == {server.port for server in server_cluster.servers}


def test_one_node_that_lives_is_enough(server_cluster: Cluster) -> None:
    dead = free_ports(1)[0]
    url = f"redis+cluster://127.0.0.1:{dead},127.0.0.1:{server_cluster.servers[2].port}"
    with connect(url, key="{default:0}") as node:
        assert node.ping()


def test_a_slot_that_moved_is_followed(server_cluster: Cluster) -> None:
    key = "{moving}"
    with connect(server_cluster.url, key=key) as node:
        assert node.set(key, "1")
        source = server_cluster.primary_of(key)
        target = next(s for s in server_cluster.servers if s is not source)
        with _migrating(source, target, key) as finish:
            # The key is there and served; another of the slot may be on either side: not followed.
            assert node.get(key) == b"1"
            with pytest.raises(redis.exceptions.ConnectionError, match="not the primary now"):
                node.get(key + "2")
            finish()
            assert node.get(key) == b"1"
            assert port_of(node) == target.port


def test_sentinels_name_the_primary(server_sentinels: Replicated) -> None:
    with connect(server_sentinels.url) as server:
        assert server.info("replication")["role"] == "master"
        assert port_of(server) == server_sentinels.primary().port
    dead = free_ports(1)[0]
    url = f"redis+sentinel://127.0.0.1:{dead},127.0.0.1:{server_sentinels.sentinels[1].port}"
    with connect(f"{url}/{SERVICE}") as server:
        assert server.ping()


def test_a_primary_that_the_sentinels_left_is_left(
    own_sentinels: Replicated, own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is cut off from them, and still answers us."""
    monkeypatch.setattr(route, "CHECK_S", 0.05)
    other = free_ports(1)[0]
    with own_server.admin() as admin:
        admin.config_set("port", other)
    with (
        connect(own_sentinels.url) as server,
        connect(own_sentinels.url, blocking=True) as blocking,
    ):
        server.xadd("here", {"f": "old"})
        for sentinel in own_sentinels.sentinels:
            with redis.Redis.from_url(sentinel.tcp_url, protocol=2) as asked:
                _call(asked, "SENTINEL", "REMOVE", SERVICE)
                _call(asked, "SENTINEL", "MONITOR", SERVICE, "127.0.0.1", other, 2)
        for client in (server, blocking):
            while client.xread({"here": "0-0"}, block=20):
                pass
        server.xadd("here", {"f": "new"})
        with own_server.admin() as admin:
            assert admin.xlen("here") == 1


def test_each_is_told_from_the_others(
    server_sentinels: Replicated, server_cluster: Cluster, own_server: Server
) -> None:
    sentinel = f"127.0.0.1:{server_sentinels.sentinels[0].port}"
    primary = f"127.0.0.1:{server_sentinels.primary().port}"
    node = f"127.0.0.1:{server_cluster.servers[0].port}"
    replica = next(s for s in server_sentinels.servers if s is not server_sentinels.primary())
    wrong = {
        f"redis://{sentinel}": "is a Sentinel, not a server; write redis.sentinel",
        f"redis://{node}": "is a node of a cluster; write redis.cluster",
        f"redis+sentinel://{primary}/{SERVICE}": "is no Sentinel",
        f"redis+sentinel://{node}/{SERVICE}": "is no Sentinel",
        f"redis+cluster://{primary}": "is no node of a cluster",
        f"redis+cluster://{sentinel}": "is no node of a cluster",
        f"redis+sentinel://{sentinel}/other": f"no service 'other'; it knows: {SERVICE}",
    }
    for url, says in wrong.items():
        with pytest.raises(WrongServer, match=says):
            connect(url)
    with pytest.raises(ServerUnreachable, match="is a replica"):
        connect(replica.tcp_url)
    dead = free_ports(1)[0]
    for url in (f"redis+cluster://127.0.0.1:{dead}", f"redis+sentinel://127.0.0.1:{dead}/m"):
        with pytest.raises(ServerUnreachable, match=r"no (node|Sentinel).* answers"):
            connect(url)


def test_tls(tls_server: Server, certificates: Certificates, request: Any) -> None:
    asks = "asks-clients" in request.node.callspec.id
    url = f"rediss://127.0.0.1:{tls_server.port}/0?ssl_ca_certs={certificates.ca}"
    ours = f"&ssl_certfile={certificates.certificate('client')}"
    ours += f"&ssl_keyfile={certificates.key('client')}"
    with connect(url + ours) as server:
        assert server.ping()
    if asks:
        with pytest.raises((WrongServer, ServerUnreachable), match="asks for a certificate"):
            connect(url)
    else:
        with connect(url) as server:
            assert server.ping()


def test_tls_by_the_environment(
    tls_server: Server, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_REDIS_CA", str(certificates.ca))
    monkeypatch.setenv("TOKENMILL_REDIS_CERT", str(certificates.certificate("client")))
    monkeypatch.setenv("TOKENMILL_REDIS_KEY", str(certificates.key("client")))
    url = f"rediss://localhost:{tls_server.port}"
    with connect(url) as server:
        assert server.ping()

    async def live() -> int:
        async with AsyncClient(url) as client:
            return await client.live()

    assert asyncio.run(live()) == 0


def test_what_is_wrong_with_tls_is_said(
    tls_server: Server,
    certificates: Certificates,
    own_server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = tls_server.port
    with pytest.raises(WrongServer, match=r"not trusted: .*TOKENMILL_REDIS_CA"):
        connect(f"rediss://127.0.0.1:{port}")
    with pytest.raises(ServerUnreachable, match="write rediss"):
        connect(f"redis://127.0.0.1:{port}")
    with pytest.raises(InvalidRequest, match="files that can be read"):
        connect(f"rediss://127.0.0.1:{port}?ssl_ca_certs=/nonexistent")
    plain = free_ports(1)[0]
    with own_server.admin() as admin:
        admin.config_set("port", plain)
    monkeypatch.setattr(connection_module, "_HELLO_TIMEOUT_S", 0.2)
    with pytest.raises(ServerUnreachable, match="if it speaks no TLS, write redis "):
        connect(f"rediss://127.0.0.1:{plain}?ssl_ca_certs={certificates.ca}")


def port_of(client: redis.Redis) -> int:
    """Where its connection leads."""
    (connection,) = client.connection_pool._available_connections
    return int(connection.port)


class _Migration:
    def __init__(self, source: Server, target: Server, key: str) -> None:
        self.nodes, self.key, self.slot = (source, target), key, key_slot(key)
        self.ids: list[str] = []

    def __enter__(self) -> Any:
        with self.nodes[0].admin() as source, self.nodes[1].admin() as target:
            self.ids = [_call(node, "CLUSTER", "MYID").decode() for node in (source, target)]
            _call(target, "CLUSTER", "SETSLOT", self.slot, "IMPORTING", self.ids[0])
            _call(source, "CLUSTER", "SETSLOT", self.slot, "MIGRATING", self.ids[1])
        return self._finish

    def _finish(self) -> None:
        with self.nodes[0].admin() as source, self.nodes[1].admin() as target:
            port = self.nodes[1].port
            _call(source, "MIGRATE", "127.0.0.1", port, self.key, 0, 1000)
            for node in (target, source):
                _call(node, "CLUSTER", "SETSLOT", self.slot, "NODE", self.ids[1])

    def __exit__(self, *_: object) -> None:
        """Give the slot back: the cluster is shared."""
        with self.nodes[0].admin() as source, self.nodes[1].admin() as target:
            target.delete(self.key)
            for node in (source, target):
                _call(node, "CLUSTER", "SETSLOT", self.slot, "NODE", self.ids[0])


def _migrating(source: Server, target: Server, key: str) -> _Migration:
    return _Migration(source, target, key)


def _call(server: redis.Redis, *arguments: Any) -> Any:
    call: Any = server.execute_command
    return call(*arguments)
