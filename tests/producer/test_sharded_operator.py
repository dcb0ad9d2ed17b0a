"""An operator over several shards, on one server and on a cluster."""

from collections.abc import Iterator

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, InvalidRequest
from tokenmill.producer.operator import Operator
from tokenmill.producer.request_id import new_request_id
from tokenmill.producer.sharded_operator import OperatorLike, operator_of
from tokenmill.producer.shards import SHARDS, Shards
from tokenmill.producer.wire import Usage
from tokenmill.worker.queue import Finish
from tokenmill.worker.shards import QueueLike, queue_of

COUNT = 3
AMPLE = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}

pytestmark = pytest.mark.everywhere


@pytest.fixture
def server_url(server_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(SHARDS, str(COUNT))
    for key in server.keys("*:shards"):
        server.delete(key)
    return server_url


@pytest.fixture
def shards(server_url: str) -> Iterator[Shards]:
    with Shards(server_url, "default") as shards:
        yield shards


@pytest.fixture
def operator(shards: Shards) -> OperatorLike:
    return operator_of(shards)


def submit_to_each(client: Client) -> list[str]:
    return [client.submit("x", request_id=new_request_id(number)) for number in range(COUNT)]


def fail_all(queue: QueueLike, ids: list[str]) -> None:
    claims = [claim for _ in ids for claim in queue.claim(**AMPLE)]
    usage = Usage(prompt_tokens=1, completion_tokens=0)
    for claim in claims:
        end = Finish(
            request_id=claim.request_id,
            epoch=claim.epoch,
            start=0,
            finish_reason="error",
            reason="poison",
            usage=usage,
        )
        queue.finish([end])


def test_status_and_purge_see_all_shards(client: Client, operator: OperatorLike) -> None:
    submit_to_each(client)
    status = operator.status()
    assert (status.live, status.waiting, status.tenants) == (COUNT, COUNT, {"default": COUNT})
    assert status.oldest_s > 0
    assert operator.purge().cancelled == COUNT
    assert operator.status().live == 0


def test_limits_are_shared_out(client: Client, shards: Shards, operator: OperatorLike) -> None:
    operator.configure(max_live=4, quotas={"t": 7}, weights={"t": 2.5}, result_ttl_s=60)
    for keys, server in shards:
        assert server.hget(keys.settings, "max_live") == b"2"
        assert server.hget(keys.settings, "quota:t") == b"3"
        assert server.hget(keys.settings, "weight:t") == b"2.5"
    assert operator.status().settings["max_live"] == "6"
    submit_to_each(client)
    submit_to_each(client)
    with pytest.raises(Busy):
        submit_to_each(client)
    with pytest.raises(InvalidRequest, match="max_live must be"):
        operator.configure(max_live=0)


def test_a_pause_holds_everywhere(client: Client, shards: Shards, operator: OperatorLike) -> None:
    submit_to_each(client)
    queue = queue_of(shards, "w")
    operator.pause()
    assert operator.status().paused
    assert [queue.claim(**AMPLE) for _ in range(COUNT)] == [[]] * COUNT
    operator.resume()
    assert not operator.status().paused
    claimed = 0
    while claimed < COUNT:
        claims = queue.claim(**AMPLE)
        assert claims or queue.wait(1.0)
        claimed += len(claims)


def test_dead_letters_of_all_shards(client: Client, shards: Shards, operator: OperatorLike) -> None:
    ids = submit_to_each(client)
    fail_all(queue_of(shards, "w"), ids)
    letters = list(operator.dead())
    assert sorted(letter.request_id for letter in letters) == sorted(ids)
    assert [letter.died_ms for letter in letters] == sorted(
        (letter.died_ms for letter in letters), reverse=True
    )
    unknown = new_request_id(1)
    told = operator.retry([*ids[:2], unknown])
    assert list(told) == [*ids[:2], unknown]
    assert list(told.values()) == ["OK", "OK", "no dead letter of that id"]
    assert operator.drop([ids[2]]) == 1
    assert list(operator.dead()) == []
    assert client.live() == 2


def test_one_shard_has_the_plain_operator(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARDS)
    with Shards(server_url, "alone", count=1) as shards:
        assert type(operator_of(shards)) is Operator
