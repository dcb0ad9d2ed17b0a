"""Request ids: `<shard>.<26 to 64 characters>`, fresh ones and those of an idempotency key."""

import hashlib
import re
import secrets
import time

from tokenmill.producer.errors import InvalidRequest

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
#: Two digits at once.
_PAIRS = [high + low for high in _CROCKFORD for low in _CROCKFORD]
_REQUEST_ID = re.compile(r"(0|[1-9][0-9]{0,4})\.[0-9A-Za-z_-]{26,64}", re.ASCII)


def new_request_id(shard: int = 0) -> str:
    """A fresh id that sorts by time: 48 bits of unix ms and 80 random bits in base 32."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return f"{shard}.{_base32(number)}"


def request_id_for(key: str, shard: int = 0) -> str:
    """The id of an idempotency key of any form: the same key gives the same id."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return f"{shard}.{_base32(int.from_bytes(digest, 'big'))}"


def check_request_id(request_id: object) -> str:
    """The id, if it has the form of one.

    Raises:
        InvalidRequest: it has not.
    """
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        expected = "<shard>.<26 to 64 of 0-9 A-Z a-z _ ->"
        remedy = "leave it out, or make one with Client.id_for(your key)"
        raise InvalidRequest("request_id", expected, request_id, remedy)
    return request_id


def _base32(number: int) -> str:
    """26 digits of a number of up to 130 bits."""
    return "".join([_PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)])
