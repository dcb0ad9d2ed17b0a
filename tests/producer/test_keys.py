import pytest

from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import new_request_id


def test_every_key_carries_the_tag() -> None:
    keys = Keys("q", 3)
    names = [
        keys.settings,
        keys.lane(1, "t"),
        keys.lanes(1),
        keys.record("i"),
        keys.output("i"),
        keys.live,
        keys.park,
        keys.workers,
        keys.own("w"),
        keys.worker("w"),
        keys.control,
        keys.dead,
    ]
    assert all(name.startswith("{q:3}:") for name in names)
    assert len(set(names)) == len(names)


def test_the_shard_is_in_the_request_id() -> None:
    assert Keys.of("q", new_request_id(12)) == Keys("q", 12)
    with pytest.raises(InvalidRequest, match="request_id must be"):
        Keys.of("q", "nonsense")


@pytest.mark.parametrize("name", ["", "a}b", "a:b", "a b", "x" * 65, "-a"])
def test_a_queue_name_that_breaks_keys_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="queue must be"):
        Keys(name)


def test_a_shard_out_of_bounds_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="shard must be"):
        Keys("q", -1)
