import pytest
import redis

from tokenmill.producer.connection import connect
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.keys import Keys
from tokenmill.producer.request_id import new_request_id
from tokenmill.producer.shards import CLUSTER_SHARDS, SHARDS, Shards

pytestmark = pytest.mark.everywhere


def test_one_shard_unless_it_is_a_cluster(server_url: str, server_kind: str) -> None:
    with Shards(server_url, "other") as shards:
        expected = CLUSTER_SHARDS if server_kind.endswith("cluster") else 1
        assert shards.count == expected
        assert [keys.shard for keys in shards.keys] == list(range(expected))


def test_whoever_comes_first_says_how_many(
    server_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.delete(Keys().shards)
    with Shards(server_url, "default", count=3) as first:
        assert first.count == 3
    with Shards(server_url, "default") as second:
        assert second.count == 3
    with pytest.raises(InvalidRequest, match="shards must be 3, as queue default has, got 4"):
        Shards(server_url, "default", count=4)
    monkeypatch.setenv(SHARDS, "5")
    with pytest.raises(InvalidRequest, match="leave out TOKENMILL_SHARDS"):
        Shards(server_url, "default")
    for wrong in ("0", "x", "257", "-1"):
        monkeypatch.setenv(SHARDS, wrong)
        with pytest.raises(InvalidRequest, match="from 1 to 256"):
            Shards(server_url, "default")


def test_each_shard_is_reached_by_its_connections(server_url: str) -> None:
    with Shards(server_url, "other", count=5) as shards:
        for number, keys in enumerate(shards.keys):
            shards.server(number).set(keys.settings, number)
            assert shards.blocking(number).get(keys.settings) == str(number).encode()
            shards.server(number).delete(keys.settings)


def test_ids_and_keys_have_their_shard(server_url: str) -> None:
    with Shards(server_url, "other", count=5) as shards:
        ids = [new_request_id(number) for number in (3, 0, 3)]
        assert [shards.number_of(request_id) for request_id in ids] == [3, 0, 3]
        assert shards.split(zip(ids, "abc", strict=True)) == {3: ["a", "c"], 0: ["b"]}
        with pytest.raises(InvalidRequest, match="an id of shard 0 to 4"):
            shards.number_of(new_request_id(5))
        numbers = [shards.number_for(f"key {n}") for n in range(100)]
        assert set(numbers) == set(range(5))
        assert numbers == [shards.number_for(f"key {n}") for n in range(100)]


def test_the_number_survives_two_first_users(server_url: str) -> None:
    """Both find nothing; the one that writes later goes by what the other has written."""
    with connect(server_url, key=Keys("other").tag) as server, Shards(server_url, "other", count=2):
        assert server.get(Keys("other").shards) == b"2"
        assert not server.set(Keys("other").shards, 3, nx=True)
