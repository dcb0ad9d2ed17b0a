"""`connect`: a connection to the Redis or Valkey server of a URL, with our own timeouts.

The client library's defaults would end a blocking read after 5 s and repeat a command that timed
out ten times. Here a blocking connection outlasts its reads and repeats nothing, the other repeats
three times, and everything sent through it is safe to repeat. RESP2, because its reply shapes are
the same in every version of the library.
"""

from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from tokenmill.producer.errors import InvalidRequest, ServerUnreachable, WrongServer

#: Longest that one blocking read may ask the server to wait.
MAX_BLOCK_S = 5.0
_SCHEMES = ("redis", "rediss", "unix")
_TIMEOUT_S = 10.0
#: For the first answer: whoever accepts and stays silent is no Redis.
_HELLO_TIMEOUT_S = 5.0
_MIN_MAJOR = 7


def connect(url: str, *, blocking: bool = False) -> redis.Redis:
    """A client of the server at `url`: redis://, rediss:// or unix://; threads may share it.

    `blocking` is for reads that wait up to `MAX_BLOCK_S`, such as `Queue.wait` and `Follower`.

    Raises:
        InvalidRequest: a URL of another form.
        ServerUnreachable: nothing answers there.
        WrongServer: what answers is not a Redis >= 7 or Valkey that we may use.
    """
    shown = _checked(url)
    retry = Retry(NoBackoff(), 0) if blocking else Retry(ExponentialBackoff(cap=0.5, base=0.02), 3)
    try:
        server: redis.Redis = redis.Redis.from_url(
            url,
            protocol=2,
            retry=retry,
            socket_timeout=MAX_BLOCK_S + _TIMEOUT_S if blocking else _TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S / 2,
        )
    except (ValueError, TypeError) as error:
        raise InvalidRequest("redis url", "redis://host:port/db", shown, str(error)) from error
    if not blocking:
        try:
            with _once(url) as first:
                _check(first, shown)
        except BaseException:
            server.close()
            raise
    return server


def shown_url(url: str) -> str:
    """The URL without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:***@{host}").geturl()


def _once(url: str) -> redis.Redis:
    once: redis.Redis = redis.Redis.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=_HELLO_TIMEOUT_S,
        socket_connect_timeout=_HELLO_TIMEOUT_S,
    )
    return once


def _checked(url: str) -> str:
    try:
        shown, scheme = shown_url(url), urlsplit(url).scheme
    except ValueError as error:
        raise InvalidRequest("redis url", "redis://host:port/db", url, str(error)) from error
    if scheme not in _SCHEMES:
        expected = "redis://, rediss:// or unix://"
        remedy = "Sentinel and Cluster are not supported yet"
        raise InvalidRequest("redis url", expected, shown, remedy)
    return shown


def _check(server: redis.Redis, shown: str) -> None:
    try:
        call: Any = server.execute_command
        reply = call("HELLO")
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        remedy = "put user and password into the URL: redis://user:password@host:port/db"
        raise WrongServer(f"{shown} refuses us: {error}; {remedy}") from error
    except (InvalidResponse, ResponseError, UnicodeDecodeError) as error:
        text = f"{shown} is not a Redis >= {_MIN_MAJOR} or Valkey: {str(error)[:100]}"
        raise WrongServer(f"{text}; check host and port") from error
    except (RedisError, OSError) as error:
        remedy = "start it, or give its address with --redis or TOKENMILL_REDIS_URL"
        raise ServerUnreachable(f"no Redis server answers at {shown}: {error}; {remedy}") from error
    hello = _pairs(reply)
    name, version = hello.get("server", "?"), hello.get("version", "0")
    if int(version.partition(".")[0]) < _MIN_MAJOR:
        raise WrongServer(
            f"{shown} must be Redis >= {_MIN_MAJOR} or Valkey, got {name} {version}; upgrade it"
        )
    if hello.get("mode") == "cluster":
        raise WrongServer(f"{shown} must be a single server, got a cluster: not supported yet")


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
