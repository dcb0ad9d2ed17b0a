"""`Address`: what a server URL says: one server, Sentinels or a cluster, TLS and credentials.

    redis://[user:password@]host[:port][/db]                           one server
    unix://[user:password@]/path/to/socket[?db=0]
    redis+sentinel://[user:password@]host[:port][,...]/service[/db]    the primary that they name
    redis+cluster://[user:password@]host[:port][,...]                  any nodes of it
    rediss://, rediss+sentinel://, rediss+cluster://                   the same over TLS

The form with Sentinels is that of docket, Prefect and redis-sentinel-url; the one of a cluster
follows it. User and password are those of the servers; those of the Sentinels are the parameters
`sentinel_username` and `sentinel_password`. TLS is set up by redis-py's names, `?ssl_ca_certs=`,
`ssl_certfile=`, `ssl_keyfile=` and so on, or by the environment: `TOKENMILL_REDIS_CA`, `_CERT`,
`_KEY`.
"""

import enum
import os
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

from redis.connection import SSLConnection, UnixDomainSocketConnection

from tokenmill.producer.errors import InvalidRequest

TLS_VARIABLES = {
    "ssl_ca_certs": "TOKENMILL_REDIS_CA",
    "ssl_certfile": "TOKENMILL_REDIS_CERT",
    "ssl_keyfile": "TOKENMILL_REDIS_KEY",
}
_TLS = ("ssl_ca_path", "ssl_password", "ssl_cert_reqs", "ssl_check_hostname", *TLS_VARIABLES)
_CREDENTIALS = ("username", "password")
_FORMS = (
    "redis://host:port/db, unix:///path, redis+sentinel://host:port,.../service or "
    "redis+cluster://host:port,... (rediss for TLS)"
)
_URL = re.compile(r"([a-z+]+)://(?:([^?#]*)@)?([^/?#@]*)(/[^?#]*)?(?:\?([^#]*))?", re.IGNORECASE)
_MEMBER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")


class Kind(enum.Enum):
    """What stands at an address."""

    SERVER = "redis"
    SENTINEL = "redis+sentinel"
    CLUSTER = "redis+cluster"


_PORTS = {Kind.SERVER: 6379, Kind.SENTINEL: 26379, Kind.CLUSTER: 6379}


@dataclass(frozen=True, slots=True)
class Address:
    """A URL, taken apart and checked."""

    kind: Kind
    #: For messages: without passwords.
    shown: str
    is_tls: bool = False
    #: Hosts and ports; none for a unix socket.
    members: tuple[tuple[str, int], ...] = ()
    #: What the Sentinels call the primary.
    service: str = ""
    #: Of a connection to a server, by the client library's names; not to be shown.
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    #: User and password of the Sentinels.
    sentinel: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Take a URL apart.

        Raises:
            InvalidRequest: it has another form.
        """
        shown = shown_url(url)
        found = _URL.fullmatch(url)
        if not found:
            raise _wrong(shown)
        scheme, user, authority, path, query = (part or "" for part in found.groups())
        if "@" in query and not all(_MEMBER.fullmatch(part) for part in authority.split(",")):
            raise _wrong(shown, "a ? in a password is written %3F")  # what we split is not shown
        if scheme.lower() == "unix":
            return cls._socket(shown, user, unquote(path), query)
        is_tls = scheme.lower().startswith("rediss")
        try:
            kind = Kind(scheme.lower().replace("rediss", "redis", 1))
        except ValueError:
            raise _wrong(shown) from None
        parameters = _parameters(query, shown, kind, is_tls=is_tls)
        sentinel = {n: parameters.pop(f"sentinel_{n}", None) for n in _CREDENTIALS}
        service, db = _path(kind, path, shown)
        options = {**_user(user), "db": db, **parameters}
        if is_tls:
            options = {"connection_class": SSLConnection, **_from_environment(), **options}
        return cls(
            kind, shown, is_tls, _members(kind, authority, shown), service, options, sentinel
        )

    @classmethod
    def _socket(cls, shown: str, user: str, path: str, query: str) -> "Address":
        if not path:
            raise _wrong(shown, "name the path of the socket")
        parameters = _parameters(query, shown, Kind.SERVER, is_tls=False, more=("db",))
        db = _db(parameters.pop("db", ""), shown)
        options = {**_user(user), "db": db, "path": path, **parameters}
        options["connection_class"] = UnixDomainSocketConnection
        return cls(Kind.SERVER, shown, options=options)


def shown_url(url: str) -> str:
    """The URL without its passwords, in whatever form it is."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    base, question, query = rest.partition("?")
    query = re.sub(r"((?:^|&)[a-z_]*password=)[^&]*", r"\1***", query, flags=re.IGNORECASE)
    # To the last @ of all of it: a password may hold a ? that should have been written %3F.
    user, at, host = f"{base}{question}{query}".rpartition("@")
    name, colon, _ = user.partition(":")
    hidden = f"{name}:***@" if colon else f"{user}{at}"
    return f"{scheme}{separator}{hidden}{host}"


def _wrong(shown: str, remedy: str = "") -> InvalidRequest:
    return InvalidRequest("redis url", _FORMS, shown, remedy)


def _user(user: str) -> dict[str, Any]:
    name, _, password = user.partition(":")
    given = {"username": unquote(name), "password": unquote(password)}
    return {key: value for key, value in given.items() if value}


def _members(kind: Kind, authority: str, shown: str) -> tuple[tuple[str, int], ...]:
    members = []
    for text in (authority or "localhost").split(","):
        found = _MEMBER.fullmatch(text.strip())
        port = int((found and found[2]) or _PORTS[kind])
        if not found or not 0 < port < 2**16:
            raise _wrong(shown, f"{text!r} is no host:port")
        members.append((found[1].strip("[]"), port))
    if kind is Kind.SERVER and len(members) > 1:
        raise _wrong(shown, "several hosts are Sentinels or a cluster: say which")
    return tuple(members)


def _path(kind: Kind, path: str, shown: str) -> tuple[str, int]:
    """The name of the service and the number of the database."""
    parts = [unquote(part) for part in path.split("/")[1:]]
    if kind is Kind.SENTINEL:
        if not parts or not parts[0]:
            raise _wrong(shown, "name the service: what the Sentinels call the primary")
        return parts[0], _db("/".join(parts[1:]), shown)
    db = _db("/".join(parts), shown)
    if kind is Kind.CLUSTER and db:
        raise _wrong(shown, "a cluster has the database 0 only")
    return "", db


def _db(text: str, shown: str) -> int:
    if not re.fullmatch(r"[0-9]{0,4}/?", text, re.ASCII):
        raise _wrong(shown, f"a database is a number, not {text!r}")
    return int(text.rstrip("/") or 0)


def _parameters(
    query: str, shown: str, kind: Kind, *, is_tls: bool, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    known = (*_CREDENTIALS, *more, *(_TLS if is_tls else ()))
    if kind is Kind.SENTINEL:
        known += tuple(f"sentinel_{name}" for name in _CREDENTIALS)
    given: dict[str, Any] = dict(parse_qsl(query))
    for name in given:
        if name not in known:
            why = "; TLS is for rediss" if name.startswith("ssl_") and not is_tls else ""
            raise _wrong(shown, f"unknown parameter {name!r}{why}; known: {', '.join(known)}")
    reqs = given.get("ssl_cert_reqs", "required")
    if reqs not in ("none", "optional", "required"):
        raise _wrong(shown, f"ssl_cert_reqs is none, optional or required, not {reqs!r}")
    if is_tls:
        checks = given.get("ssl_check_hostname", "no" if reqs == "none" else "yes")
        given["ssl_check_hostname"] = checks.lower() not in ("0", "false", "f", "no", "n")
    return given


def _from_environment() -> dict[str, Any]:
    found = {name: os.environ.get(variable) for name, variable in TLS_VARIABLES.items()}
    return {name: path for name, path in found.items() if path}
