"""`Pulse`, the sign of life of the loop, and `HealthServer`, which shows it to Kubernetes.

    /livez    200 while the last step, or idle turn, of the loop is younger than the limit; also
              while the model is being loaded, which is for the startup probe to bound
    /startedz 200 once the model is loaded, for the startup probe: a worker that is loaded is not to
              be started again because the server is away
    /readyz   200 when the model is loaded, the worker registered, and the server answers

Liveness never asks for Redis: restarting workers does not bring a server back.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from tokenmill.producer.errors import InvalidRequest


class Pulse:
    """When the loop last went round."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        #: None until the loop begins.
        self._beat_at: float | None = None

    def beat(self) -> None:
        self._beat_at = self._clock()

    @property
    def age_s(self) -> float:
        return 0.0 if self._beat_at is None else self._clock() - self._beat_at

    @property
    def is_alive(self) -> bool:
        return self.age_s < self.limit_s


class HealthServer:
    """Answers the probes from its own thread; use it in a `with`."""

    def __init__(
        self,
        port: int,
        pulse: Pulse,
        *,
        is_started: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        """Listen on every address; port 0 takes a free one.

        Raises:
            InvalidRequest: the port is taken, or may not be used.
        """

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/livez":
                    age_s = round(pulse.age_s, 3)
                    answer = {"age_s": age_s, "limit_s": pulse.limit_s}
                    self._reply(answer, is_ok=age_s < pulse.limit_s)
                elif self.path == "/startedz":
                    started = is_started()
                    self._reply({"started": started}, is_ok=started)
                elif self.path == "/readyz":
                    ready = is_ready()
                    self._reply({"ready": ready}, is_ok=ready)
                else:
                    self.send_error(HTTPStatus.NOT_FOUND)

            def _reply(self, answer: Mapping[str, object], *, is_ok: bool) -> None:
                body = json.dumps(answer).encode()
                status = HTTPStatus.OK if is_ok else HTTPStatus.SERVICE_UNAVAILABLE
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """A probe every few seconds is no news."""

        try:
            self._server = _DualStackServer(("", port), Handler)
        except OSError as error:
            expected = "a port that can be listened on"
            raise InvalidRequest("health_port", expected, port, str(error)) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="health", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _DualStackServer(ThreadingHTTPServer):
    """IPv4, and IPv6 where there is any: a probe comes to the pod's address of either kind."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()
