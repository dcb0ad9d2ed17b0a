"""Producers and worker processes over TLS, with a server that asks everybody for a certificate."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from servers import (
    Certificates,
    Cluster,
    Replicated,
    Server,
    cluster,
    free_ports,
    replicated,
    running,
)
from tokenmill.producer.client import Client


@pytest.fixture(params=["server", "sentinel", "cluster"])
def tls_url(
    request: pytest.FixtureRequest, server_kind: str, certificates: Certificates
) -> Iterator[str]:
    """The URL of servers that speak TLS alone."""
    if server_kind != "redis":
        pytest.skip("the Valkey of the wheel is built without TLS")
    tls = certificates.options(asks_clients=True)
    with ExitStack() as stack:
        servers: Server | Replicated | Cluster
        if request.param == "sentinel":
            servers = stack.enter_context(replicated("redis", tls=tls))
            yield servers.url
        elif request.param == "cluster":
            servers = stack.enter_context(cluster("redis", tls=tls))
            yield servers.url
        else:
            port = free_ports(1)[0]
            servers = stack.enter_context(running("redis", port=port, tls=tls))
            yield f"rediss://127.0.0.1:{port}"


def test_workers_and_producers_talk_over_tls(
    tls_url: str,
    certificates: Certificates,
    start_worker: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENMILL_REDIS_CA", str(certificates.ca))
    monkeypatch.setenv("TOKENMILL_REDIS_CERT", str(certificates.certificate("client")))
    monkeypatch.setenv("TOKENMILL_REDIS_KEY", str(certificates.key("client")))
    worker = start_worker(url=tls_url)
    with Client(tls_url) as client:
        results = list(client.map([f"prompt {n}" for n in range(20)], max_tokens=8))
        assert [result.finish_reason for result in results] == ["length"] * 20
        ids = [client.submit(f"followed {n}", max_tokens=8) for n in range(4)]
        deltas = list(client.follow_many(ids))
        assert sum(len(delta.token_ids) for delta in deltas) == 32
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
