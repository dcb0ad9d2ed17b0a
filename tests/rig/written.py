"""What the server of a test has of a request of the default queue."""

from typing import Any

import redis

from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import unpack_token_ids

KEYS = Keys()


def entries(server: redis.Redis, request_id: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(entry id, tokens, text) of each."""
    raw: Any = server.xrange(KEYS.output(request_id))
    return [(key.decode(), unpack_token_ids(f[b"t"]), f[b"x"].decode()) for key, f in raw]


def state(server: redis.Redis, request_id: str) -> str:
    raw: Any = server.hget(KEYS.record(request_id), "state")
    return str(raw.decode())
