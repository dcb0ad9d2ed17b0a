"""`audit`: whether a shard contradicts itself, seen in one instant."""

from pathlib import Path

import redis
from redis.exceptions import RedisError

SCRIPT = (Path(__file__).parent / "audit.lua").read_text("utf-8")


def audit(server: redis.Redis, tag: str) -> list[str]:
    """What is wrong, in words; nothing if the server is down."""
    try:
        wrong = server.eval(SCRIPT, 1, tag)
    except RedisError:
        return []
    return [text.decode() for text in wrong]
