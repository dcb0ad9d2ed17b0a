from typing import Any

import pytest
from redis.connection import SSLConnection

from tokenmill.producer.address import Address, Kind, shown_url
from tokenmill.producer.errors import InvalidRequest


def test_one_server() -> None:
    address = Address.parse("redis://me:p%40ss@h:7/3")
    assert (address.kind, address.members, address.is_tls) == (Kind.SERVER, (("h", 7),), False)
    assert address.options == {"username": "me", "password": "p@ss", "db": 3}
    assert Address.parse("redis://").members == (("localhost", 6379),)
    assert Address.parse("redis://[::1]:7").members == (("::1", 7),)


def test_a_socket() -> None:
    address = Address.parse("unix://:secret@/run/a%20b.sock?db=2")
    assert address.options["path"] == "/run/a b.sock"
    assert address.options["db"] == 2
    assert address.options["password"] == "secret"


def test_sentinels() -> None:
    address = Address.parse(
        "redis+sentinel://u:p@s1,s2:7,[::1]:8/mill/4?sentinel_username=w&sentinel_password=q"
    )
    assert address.kind is Kind.SENTINEL
    assert address.members == (("s1", 26379), ("s2", 7), ("::1", 8))
    assert (address.service, address.options["db"]) == ("mill", 4)
    assert address.options["password"] == "p"
    assert address.sentinel == {"username": "w", "password": "q"}


def test_a_cluster_over_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_REDIS_CA", "/ca")
    monkeypatch.setenv("TOKENMILL_REDIS_CERT", "/cert")
    address = Address.parse("rediss+cluster://a,b:7?ssl_certfile=/other&ssl_keyfile=/key")
    assert (address.kind, address.is_tls) == (Kind.CLUSTER, True)
    assert address.members == (("a", 6379), ("b", 7))
    options = address.options
    assert options["connection_class"] is SSLConnection
    assert options["ssl_ca_certs"] == "/ca"
    assert options["ssl_certfile"] == "/other"
    assert options["ssl_check_hostname"] is True
    assert "ssl_ca_certs" not in Address.parse("redis://a").options


@pytest.mark.parametrize(("given", "checks"), [("false", False), ("True", True), ("no", False)])
def test_the_name_is_checked_unless_told_otherwise(given: str, checks: Any) -> None:
    address = Address.parse(f"rediss://h?ssl_check_hostname={given}")
    assert address.options["ssl_check_hostname"] is checks
    assert Address.parse("rediss://h?ssl_cert_reqs=none").options["ssl_check_hostname"] is False


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://a,b", "say which"),
        ("redis+sentinel://h", "name the service"),
        ("redis+sentinel://h/mill/x", "a database is a number"),
        ("redis+cluster://h/1", "database 0 only"),
        ("redis://h:70000", "no host:port"),
        ("redis://h?socket_timeout=1", "unknown parameter 'socket_timeout'"),
        ("redis://h?ssl_ca_certs=/x", "TLS is for rediss"),
        ("redis://h?sentinel_password=x", "unknown parameter"),
        ("rediss://h?ssl_cert_reqs=maybe", "none, optional or required"),
        ("unix://", "path of the socket"),
        ("rediss+what://h", "redis url must be"),
        ("redis://h#x", "redis url must be"),
    ],
)
def test_what_is_refused_and_why(url: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Address.parse(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:secret@h:1/0", "redis://u:***@h:1/0"),
        ("redis://:secret@h", "redis://:***@h"),
        ("redis://h:1", "redis://h:1"),
        ("redis://u:se@cret/x@h", "redis://u:***@h"),
        ("redis://u:sec?secret@h:1/0", "redis://u:***@h:1/0"),
        ("redis://u:secret?sec=x@h:1/0", "redis://u:***@h:1/0"),
        ("redis://u:sec?a=1&secret=1@h?db=1", "redis://u:***@h?db=1"),
        ("redis://h:1?password=se@secret&db=1", "redis://h:1?password=***&db=1"),
        ("unix://:secret@/path", "unix://:***@/path"),
        ("redis+sentinel://u:secret@a:1,b:2/m", "redis+sentinel://u:***@a:1,b:2/m"),
        ("redis://h?password=secret&db=1", "redis://h?password=***&db=1"),
        (
            "redis+sentinel://h/m?sentinel_password=secret",
            "redis+sentinel://h/m?sentinel_password=***",
        ),
        ("http://u:secret@[h", "http://u:***@[h"),
        ("u:secret@h", "u:***@h"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    assert "secret" not in _said_of(url)


def test_a_path_with_an_at_sign_is_no_password() -> None:
    address = Address.parse("rediss://h:7/3?ssl_ca_certs=/a@b/ca.pem")
    assert (address.members, address.options["db"]) == ((("h", 7),), 3)
    assert address.options["ssl_ca_certs"] == "/a@b/ca.pem"


def _said_of(url: str) -> str:
    try:
        return repr(Address.parse(url))
    except InvalidRequest as error:
        return str(error)
