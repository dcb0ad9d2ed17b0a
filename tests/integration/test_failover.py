"""The primary dies under load: whoever reads on sees every token once, in order."""

import signal
from collections.abc import Callable
from typing import Any

import pytest

from servers import Cluster, Replicated, Server, free_ports, running
from tokenmill.producer.client import Client
from tokenmill.producer.errors import OutputChanged, ServerUnreachable
from tokenmill.producer.keys import Keys
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import Delta

KEYS = Keys()
#: A new replica is not made to wait for others.
AT_ONCE = ("--repl-diskless-sync-delay", "0")
StartWorker = Callable[..., Any]
CheckedStream = Callable[..., Any]

pytestmark = pytest.mark.timeout(120)


def submit(client: Client, count: int, max_tokens: int) -> dict[str, str]:
    """Prompts by request id."""
    prompts = [f"question {number}" for number in range(count)]
    return {client.submit(prompt, max_tokens=max_tokens): prompt for prompt in prompts}


def follow_through(
    client: Client, rows: dict[str, str], kill: Callable[[], None], *, after: int
) -> list[Delta]:
    """Follow all; `kill` once so many deltas were read."""
    deltas: list[Delta] = []
    follower = client.follower()
    for request_id in rows:
        follower.add(request_id)
    while len(follower):
        deltas += follower.poll(0.5)
        if after and len(deltas) >= after:
            kill()
            after = 0
    assert not after, "all ended before the primary was killed"
    return deltas


def check_reader(rows: dict[str, str], deltas: list[Delta], max_tokens: int) -> None:
    position = dict.fromkeys(rows, 0)
    ended: list[str] = []
    for delta in deltas:
        assert delta.start == position[delta.request_id], "a gap or a repeat"
        assert delta.request_id not in ended
        position[delta.request_id] = delta.end
        if delta.finish_reason:
            ended.append(delta.request_id)
    assert sorted(ended) == sorted(rows)
    assert set(position.values()) == {max_tokens}


def check_failover(
    url: str,
    primary: Server,
    start_worker: StartWorker,
    checked_stream: CheckedStream,
) -> None:
    with Client(url) as client:
        workers = [start_worker(url=url), start_worker(url=url)]
        for worker in workers:
            worker.wait_ready()
        rows = submit(client, 24, 200)
        deltas = follow_through(client, rows, primary.kill, after=100)
        check_reader(rows, deltas, 200)
        assert not client.live()
        with Shards(url, "default") as shards:
            for request_id, prompt in rows.items():
                stream = checked_stream(request_id, prompt, shards=shards)
                assert stream.finish_reasons == ["length"]
        for worker in workers:
            worker.send(signal.SIGTERM)
        assert [worker.wait() for worker in workers] == [0, 0]


@pytest.mark.placed("sentinel")
def test_sentinels_promote_a_replica_under_load(
    own_sentinels: Replicated, start_worker: StartWorker, checked_stream: CheckedStream
) -> None:
    primary = own_sentinels.primary()
    check_failover(own_sentinels.url, primary, start_worker, checked_stream)
    assert own_sentinels.primary() is not primary


@pytest.mark.placed("cluster")
def test_a_cluster_promotes_a_replica_under_load(
    own_cluster: Cluster, start_worker: StartWorker, checked_stream: CheckedStream
) -> None:
    primary = own_cluster.primary_of(KEYS.tag)
    check_failover(own_cluster.url, primary, start_worker, checked_stream)
    assert own_cluster.primary_of(KEYS.tag) is not primary


def read_to(follower: Any, tokens: int) -> list[int]:
    """Tokens of the one followed request, at least so many."""
    read: list[int] = []
    while len(read) < tokens:
        for delta in follower.poll(1.0):
            assert not delta.finish_reason
            read += delta.token_ids
    return read


@pytest.mark.placed("")
def test_a_reader_is_told_when_a_failover_rolls_back_what_it_read(
    server_kind: str, start_worker: StartWorker, checked_stream: CheckedStream
) -> None:
    """A replica that was cut off is promoted: asynchronous replication at its worst."""
    port = free_ports(1)[0]
    with running(server_kind, *AT_ONCE, port=port) as primary, running(server_kind) as replica:
        replica.replicate(primary)
        with Client(primary.tcp_url) as client:
            worker = start_worker(url=primary.tcp_url)
            request_id = client.submit("to be forked", max_tokens=600)
            follower = client.follower()
            follower.add(request_id)
            first = read_to(follower, 50)
            with replica.admin() as admin:
                admin.replicaof("NO", "ONE")
            first += read_to(follower, 100)
            primary.kill()
            replica.kill()
            replica.port = port
            replica.start()
            with pytest.raises(OutputChanged, match="lost part of it; read it again"):
                read_to(follower, 600)
            again = client.result(request_id, timeout_s=30)
            pairs = enumerate(zip(first, again.token_ids, strict=False))
            common = next(n for n, (was, is_now) in pairs if was != is_now)
            assert 50 <= common < len(first)  # what had been replicated is as it was
            assert len(again.token_ids) == 600
            with Shards(replica.url, "default") as shards:
                stream = checked_stream(request_id, "to be forked", shards=shards)
            assert len(set(stream.epochs)) == 2
            worker.send(signal.SIGTERM)
            assert worker.wait() == 0


@pytest.mark.placed("")
def test_writes_wait_for_enough_replicas(
    server_kind: str, start_worker: StartWorker, checked_stream: CheckedStream
) -> None:
    port = free_ports(1)[0]
    safe = (*AT_ONCE, "--min-replicas-to-write", "1", "--min-replicas-max-lag", "10")
    with running(server_kind, *safe, port=port) as primary, running(server_kind) as replica:
        replica.replicate(primary)
        with Client(primary.tcp_url) as client:
            worker = start_worker(url=primary.tcp_url)
            rows = submit(client, 4, 200)
            follower = client.follower()
            for request_id in rows:
                follower.add(request_id)
            deltas: list[Delta] = []
            while len(deltas) < 10:
                deltas += follower.poll(1.0)
            with replica.admin() as admin:
                admin.replicaof("NO", "ONE")
            worker.wait_for(b"NOREPLICAS")
            with pytest.raises(ServerUnreachable, match="cannot do this now: NOREPLICAS"):
                client.submit("refused")
            replica.replicate(primary)
            while len(follower):
                deltas += follower.poll(1.0)
            check_reader(rows, deltas, 200)
            assert {client.result(request_id).finish_reason for request_id in rows} == {"length"}
            worker.send(signal.SIGTERM)
            assert worker.wait() == 0
