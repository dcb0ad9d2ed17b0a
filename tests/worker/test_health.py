"""The probes over HTTP, and the signs they go by."""

import json
from http.client import HTTPConnection
from typing import Any

import pytest

from tokenmill.producer.errors import InvalidRequest
from tokenmill.worker.health import HealthServer, Pulse


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, Any]:
    connection = HTTPConnection(host, port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, json.loads(body) if response.status != 404 else None


@pytest.fixture
def now() -> list[float]:
    return [100.0]


@pytest.fixture
def pulse(now: list[float]) -> Pulse:
    return Pulse(60.0, lambda: now[0])


def test_livez_fails_when_the_loop_hangs(pulse: Pulse, now: list[float]) -> None:
    with HealthServer(0, pulse, is_started=lambda: False, is_ready=lambda: False) as server:
        now[0] += 600.0
        assert get(server.port, "/livez")[0] == 200  # the model is being loaded
        pulse.beat()
        now[0] += 59.0
        assert get(server.port, "/livez") == (200, {"age_s": 59.0, "limit_s": 60.0})
        now[0] += 1.0
        assert get(server.port, "/livez")[0] == 503
        pulse.beat()
        assert get(server.port, "/livez")[0] == 200


def test_readyz_follows_readiness(pulse: Pulse) -> None:
    ready = [False]
    with HealthServer(0, pulse, is_started=lambda: True, is_ready=lambda: ready[0]) as server:
        assert get(server.port, "/readyz") == (503, {"ready": False})
        ready[0] = True
        assert get(server.port, "/readyz") == (200, {"ready": True})
        assert get(server.port, "/other")[0] == 404


def test_startedz_does_not_ask_for_the_server(pulse: Pulse) -> None:
    started = [False]
    with HealthServer(0, pulse, is_started=lambda: started[0], is_ready=lambda: False) as server:
        assert get(server.port, "/startedz") == (503, {"started": False})
        started[0] = True
        assert get(server.port, "/startedz") == (200, {"started": True})


def test_a_port_can_be_taken_again_after_the_server_ended(pulse: Pulse) -> None:
    with HealthServer(0, pulse, is_started=lambda: True, is_ready=lambda: True) as server:
        port = server.port
    with HealthServer(port, pulse, is_started=lambda: True, is_ready=lambda: True):
        assert get(port, "/livez")[0] == 200
        with pytest.raises(InvalidRequest, match=r"health_port must be .*in use"):
            HealthServer(port, pulse, is_started=lambda: True, is_ready=lambda: True)
