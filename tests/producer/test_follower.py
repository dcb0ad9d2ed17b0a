from collections.abc import Callable

import pytest
import redis

from tokenmill.producer import following as following_module
from tokenmill.producer.client import Client
from tokenmill.producer.errors import InvalidRequest, NotFound, OutputChanged
from tokenmill.producer.follower import Follower
from tokenmill.producer.following import check_position
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator

pytestmark = pytest.mark.everywhere


@pytest.fixture
def client(either_client: Client) -> Client:
    return either_client


def test_an_empty_follower_has_nothing(client: Client) -> None:
    follower = client.follower()
    assert follower.poll(10) == []
    assert len(follower) == 0


def test_add_and_remove(client: Client, echo_worker: None) -> None:
    follower = client.follower()
    kept, dropped = client.submit("kept"), client.submit("dropped")
    follower.add(kept)
    follower.add(dropped)
    follower.remove(dropped)
    follower.remove(dropped)
    seen = []
    while len(follower):
        seen += follower.poll(5)
    assert {delta.request_id for delta in seen} == {kept}
    assert "".join(delta.text for delta in seen) == "kept"
    with pytest.raises(InvalidRequest, match="start must be"):
        follower.add(kept, -1)


def test_a_vanished_request_is_noticed_after_a_silence(
    client: Client, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = client.submit("x")
    follower = client.follower()
    follower.add(request_id)
    assert follower.poll(0.01) == []
    monkeypatch.setattr(following_module, "MAX_BLOCK_S", 0.0)
    assert follower.poll(0.01) == []  # silent, but it is there
    server.delete(Keys().record(request_id))
    other = client.submit("y")
    follower.add(other)
    with pytest.raises(NotFound, match=request_id) as caught:
        follower.poll(0.01)
    assert caught.value.request_id == request_id
    assert len(follower) == 1
    client.cancel(other)
    assert [delta.request_id for delta in follower.poll(5)] == [other]


def test_a_lost_request_is_noticed_while_others_talk(
    client: Client, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following_module, "CHECK_S", 0.0)
    follower = client.follower()
    lost, waiting, *others = (client.submit("x") for _ in range(4))
    for request_id in (lost, waiting, *others):
        follower.add(request_id)
    server.delete(Keys().record(lost))
    for request_id in others:
        client.cancel(request_id)
        assert [delta.request_id for delta in follower.poll(5)] == [request_id]
    with pytest.raises(NotFound) as caught:
        follower.poll(0.01)
    assert caught.value.request_id == lost
    assert len(follower) == 1


@pytest.mark.parametrize(("start", "offset"), [(0, b"0"), (3, b"3"), (0, b"3")])
def test_a_position_that_has_more_to_say(start: int, offset: bytes) -> None:
    check_position("id", start, b"end", offset)


def test_a_position_beyond_the_end() -> None:
    check_position("id", 4, b"run", b"3")
    with pytest.raises(InvalidRequest, match="start must be at most 3"):
        check_position("id", 4, b"end", b"3")


def test_a_long_output_does_not_hold_up_others(
    client: Client, make_follower_input: Callable[[Follower], tuple[str, str]]
) -> None:
    follower = client.follower()
    long, short = make_follower_input(follower)
    first = follower.poll(5)
    assert {delta.request_id for delta in first} == {long, short}


@pytest.fixture
def make_follower_input(client: Client, echo_worker: None) -> Callable[[Follower], tuple[str, str]]:
    def make(follower: Follower) -> tuple[str, str]:
        long, short = client.submit("x" * 400), client.submit("short")
        for request_id in (long, short):
            client.result(request_id, timeout_s=30)
            follower.add(request_id)
        return long, short

    return make


def test_an_end_before_what_was_read_is_told_and_the_others_go_on(
    client: Client, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server lost tokens that were read, and the request has ended with fewer."""
    follower = client.follower()
    short, other = client.submit("x"), client.submit("y")
    follower.add(short)
    follower.add(other)
    follower._cursors[Keys().output(short)] = "5-0"
    client.cancel(short)
    monkeypatch.setattr(following_module, "MAX_BLOCK_S", 0.0)
    with pytest.raises(OutputChanged) as caught:
        follower.poll(0.01)
    assert caught.value.request_id == short
    assert len(follower) == 1
    assert follower.poll(0.01) == []


def test_what_was_read_before_a_change_is_given_first(client: Client, echo_worker: None) -> None:
    follower = client.follower()
    whole, changed = client.submit("whole"), client.submit("changed")
    for request_id in (whole, changed):
        client.result(request_id, timeout_s=30)
        follower.add(request_id)
    follower._digests[Keys().output(changed)] = "00" * 8
    assert "".join(delta.text for delta in follower.poll(5)) == "whole"
    assert len(follower) == 1
    with pytest.raises(OutputChanged) as caught:
        follower.poll(5)
    assert caught.value.request_id == changed
    assert len(follower) == 0


def test_who_begins_in_the_middle_gets_no_token_again(
    client: Client, server: redis.Redis, echo_worker: None
) -> None:
    request_id = client.submit("abcdef")
    client.result(request_id, timeout_s=10)
    follower = client.follower()
    follower.add(request_id, 2)
    assert "".join(delta.text for delta in follower.poll(5)) == "cdef"
    Operator(server, Keys()).compact([request_id])
    follower.add(request_id, 2)
    with pytest.raises(OutputChanged):
        follower.poll(5)
    follower.add(request_id)
    assert "".join(delta.text for delta in follower.poll(5)) == "abcdef"


def test_who_kept_the_digest_notices_what_changed_before_its_position(
    client: Client, server: redis.Redis, echo_worker: None
) -> None:
    request_id = client.submit("abcdef")
    first = client.follower()
    first.add(request_id)
    read = first.poll(5)[0]
    client.result(request_id, timeout_s=10)
    follower = client.follower()
    follower.add(request_id, read.end, digest=read.digest)
    assert "".join(delta.text for delta in follower.poll(5)) == "abcdef"[read.end :]
    follower.add(request_id, read.end, digest="0" * 16)
    with pytest.raises(OutputChanged):
        follower.poll(5)
