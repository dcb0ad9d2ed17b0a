"""`connect`: a connection to the Redis or Valkey primary of a URL, with our own timeouts.

The client library's defaults would end a blocking read after 5 s and repeat a command that timed
out ten times. Here a blocking connection outlasts its reads and repeats nothing, the other repeats
three times, and everything sent through it is safe to repeat. RESP2, because its reply shapes are
the same in every version of the library.
"""

from typing import Any

import redis
from redis.backoff import AbstractBackoff, ExponentialBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from tokenmill.producer.address import Address, Kind
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable, WrongServer
from tokenmill.producer.route import (
    ClusterMap,
    Misdirected,
    Route,
    RoutedConnection,
    RoutedSSLConnection,
    SentinelRoute,
    SlotRoute,
    key_slot,
)

#: Longest that one blocking read may ask the server to wait.
MAX_BLOCK_S = 5.0
_TIMEOUT_S = 10.0
#: For the first answer: whoever accepts and stays silent is no Redis.
_HELLO_TIMEOUT_S = 5.0
_MIN_MAJOR = 7


class Connector:
    """Opens connections to one address; those to a cluster share what is known of it."""

    def __init__(self, url: str) -> None:
        """Check the form of the URL.

        Raises:
            InvalidRequest: it is of another form.
        """
        self.address = Address.parse(url)
        self._cluster = ClusterMap(self.address) if self.is_cluster else None

    @property
    def is_cluster(self) -> bool:
        return self.address.kind is Kind.CLUSTER

    def connect(self, *, blocking: bool = False, key: str = "", checks: bool = True) -> redis.Redis:
        """As the function `connect`; without `checks` the server is not asked what it is."""
        if checks and not blocking:
            with self._open(key, Retry(NoBackoff(), 0), _HELLO_TIMEOUT_S) as first:
                _check(first, self.address)
        return self._open(key, Retry(*retries(blocking=blocking)), timeout_of(blocking=blocking))

    def options(self, key: str, timeout_s: float) -> dict[str, Any]:
        """Of a connection, by the client library's names; a `route` where the primary may move."""
        options = dict(self.address.options)
        if route := self._route(key):
            options["route"] = route
        elif self.address.members:
            options["host"], options["port"] = self.address.members[0]
        return {
            **options,
            "protocol": 2,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": min(timeout_s, _HELLO_TIMEOUT_S),
        }

    def _open(self, key: str, retry: Retry, timeout_s: float) -> redis.Redis:
        options = self.options(key, timeout_s)
        if "route" in options:
            is_tls = self.address.is_tls
            options["connection_class"] = RoutedSSLConnection if is_tls else RoutedConnection
        return redis.Redis.from_pool(redis.ConnectionPool(retry=retry, **options))

    def _route(self, key: str) -> Route | None:
        """What leads to the primary; None where it never moves."""
        if self._cluster:
            return SlotRoute(self._cluster, key_slot(key))
        return SentinelRoute(self.address) if self.address.kind is Kind.SENTINEL else None


def retries(*, blocking: bool) -> tuple[AbstractBackoff, int]:
    """How often a command is repeated: a blocking read, whose end cannot be told, never."""
    return (NoBackoff(), 0) if blocking else (ExponentialBackoff(cap=0.5, base=0.02), 3)


def timeout_of(*, blocking: bool) -> float:
    """Longest to wait for an answer, in seconds."""
    return MAX_BLOCK_S + _TIMEOUT_S if blocking else _TIMEOUT_S


def connect(url: str, *, blocking: bool = False, key: str = "") -> redis.Redis:
    """A client of the primary at `url`, in a form of `Address`; threads may share it.

    `blocking` is for reads that wait up to `MAX_BLOCK_S`, such as `Queue.wait` and `Follower`. On a
    cluster it serves the slot of `key`, on whichever node that is.

    Raises:
        InvalidRequest: a URL of another form.
        ServerUnreachable: nothing answers there.
        WrongServer: what answers is not a Redis >= 7 or Valkey that we may use.
    """
    return Connector(url).connect(blocking=blocking, key=key)


def _check(server: redis.Redis, address: Address) -> None:
    shown = address.shown
    try:
        call: Any = server.execute_command
        reply = call("HELLO")
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        remedy = "put user and password into the URL: redis://user:password@host:port/db"
        raise WrongServer(f"{shown} refuses us: {error}; {remedy}") from error
    except Misdirected as error:
        raise WrongServer(f"{shown}: {error}") from error
    except (InvalidResponse, ResponseError, UnicodeDecodeError) as error:
        text = f"{shown} is not a Redis >= {_MIN_MAJOR} or Valkey: {str(error)[:100]}"
        raise WrongServer(f"{text}; check host and port") from error
    except (RedisError, OSError) as error:
        _explain_tls(address, error)
        remedy = "start it, or give its address with --redis or TOKENMILL_REDIS_URL"
        raise ServerUnreachable(f"no Redis server answers at {shown}: {error}; {remedy}") from error
    _check_hello(_pairs(reply), address)


def _explain_tls(address: Address, error: Exception) -> None:
    """Say what to do about TLS, where that is what failed.

    Raises:
        ServerUnreachable, WrongServer, InvalidRequest: it is.
    """
    text, shown = str(error), address.shown
    names = "?ssl_certfile= and ssl_keyfile= or TOKENMILL_REDIS_CERT and _KEY"
    if any(said in text for said in ("closed by server", "EOF occurred", "reset by peer")):
        remedy = "if it speaks TLS, write rediss in the place of redis"
        if address.is_tls:
            remedy = f"if it asks for a certificate, name ours by {names}"
        raise ServerUnreachable(f"{shown} closes the connection: {text}; {remedy}") from error
    if not address.is_tls:
        return
    if isinstance(error, FileNotFoundError) or "No such file" in text or "[X509" in text:
        which = "ssl_ca_certs, ssl_certfile and ssl_keyfile"
        raise InvalidRequest(which, "files that can be read", text, "check the paths") from error
    if "CERTIFICATE_VERIFY_FAILED" in text:
        remedy = "name its CA by ?ssl_ca_certs= or TOKENMILL_REDIS_CA"
        raise WrongServer(f"{shown} is not trusted: {text}; {remedy}") from error
    if "CERTIFICATE_REQUIRED" in text.upper().replace(" ", "_"):
        raise WrongServer(
            f"{shown} asks for a certificate: {text}; name ours by {names}"
        ) from error
    remedy = "if it speaks no TLS, write redis in the place of rediss"
    if "SSL" in text:
        raise WrongServer(f"{shown} does not speak TLS with us: {text}; {remedy}") from error
    if isinstance(error, RedisTimeoutError):  # a plain server waits for the end of a line
        raise ServerUnreachable(f"{shown} does not answer: {text}; {remedy}") from error


def _check_hello(hello: dict[str, str], address: Address) -> None:
    shown = address.shown
    name, version = hello.get("server", "?"), hello.get("version", "0")
    if int(version.partition(".")[0]) < _MIN_MAJOR:
        raise WrongServer(
            f"{shown} must be Redis >= {_MIN_MAJOR} or Valkey, got {name} {version}; upgrade it"
        )
    mode = hello.get("mode", "standalone")
    if mode == "sentinel":
        remedy = "write redis+sentinel://host:port,.../service"
        raise WrongServer(f"{shown} is a Sentinel, not a server; {remedy}")
    if mode == "cluster" and address.kind is not Kind.CLUSTER:
        remedy = "write redis+cluster://host:port,..."
        raise WrongServer(f"{shown} is a node of a cluster; {remedy}")
    if hello.get("role") in ("slave", "replica"):
        remedy = "give the address of its primary, or of its Sentinels"
        raise ServerUnreachable(f"{shown} is a replica, which takes no writes; {remedy}")


def _pairs(reply: object) -> dict[str, str]:
    if isinstance(reply, dict):
        items = list(reply.items())
    elif isinstance(reply, list):
        items = list(zip(reply[::2], reply[1::2], strict=False))
    else:
        items = []
    return {_text(key): _text(value) for key, value in items}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
