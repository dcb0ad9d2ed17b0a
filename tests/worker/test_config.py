"""Bounds of a worker's settings, and numbers of bytes as people write them."""

from typing import Any

import pytest

from tokenmill.producer.errors import InvalidRequest
from tokenmill.worker.config import WorkerConfig, parse_bytes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("queue", "a b"),
        ("threads", 0),
        ("lease_ms", 99),
        ("stall_limit_s", 0.0),
        ("drain_s", -1.0),
        ("exit_when_idle_s", 0.0),
        ("health_port", 65_536),
    ],
)
def test_a_value_out_of_bounds_is_named(field: str, value: object) -> None:
    values: dict[str, Any] = {"model": "m", "redis_url": "redis://x", field: value}
    with pytest.raises(InvalidRequest, match=f"^{field} must be"):
        WorkerConfig(**values)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1073741824", 2**30),
        ("2GiB", 2**31),
        ("2gib", 2**31),
        ("1.5 KiB", 1536),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("1T", 10**12),
        ("64Mi", 2**26),
        ("7B", 7),
    ],
)
def test_bytes(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 GiB x", "1e9", "2XiB", "2iB"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_memory must be bytes such as 2GiB"):
        parse_bytes(text)
