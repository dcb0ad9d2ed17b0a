"""Whole outputs through one stream: kept until taken, and resumed from checkpoints."""

from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.errors import InvalidRequest, NotFound
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish, Queue, Verdict

MakeQueue = Callable[..., Queue]
KEYS = Keys()
AMPLE: dict[str, Any] = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}


@pytest.fixture
def client(either_client: Client) -> Client:
    return either_client


def commit(queue: Queue, claim: Claim, start: int, *ids: int, text: str) -> Verdict:
    append = Append(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=ids,
        text=text,
        digest=chain_digest("", ids),
    )
    return queue.append([append])[0]


def finish(queue: Queue, claim: Claim, start: int, *ids: int, text: str) -> Verdict:
    end = Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=ids,
        text=text,
        digest=chain_digest("", ids),
        finish_reason="stop",
        usage=Usage(prompt_tokens=3, completion_tokens=start + len(ids)),
    )
    return queue.finish([end])[0]


def test_a_whole_output_is_one_entry(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x", reply_to="mine")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    assert commit(queue, claim, 0, 1, 2, text="ab") is Verdict.OK
    assert commit(queue, claim, 0, 1, 2, text="ab") is Verdict.OK  # a repeat
    assert commit(queue, claim, 3, 9, text="z") is Verdict.GAP
    assert finish(queue, claim, 2, 3, text="c") is Verdict.OK
    assert finish(queue, claim, 2, 3, text="c") is Verdict.OK
    replies = client.replies("mine")
    (result,) = replies.poll(1)
    assert (result.request_id, result.token_ids, result.text) == (request_id, (1, 2, 3), "abc")
    assert result.usage == Usage(prompt_tokens=3, completion_tokens=3)
    assert replies.poll(0.01) == []
    assert not server.exists(KEYS.output(request_id))


def test_another_worker_goes_on_from_the_checkpoint(client: Client, make_queue: MakeQueue) -> None:
    client.submit("x", reply_to="mine")
    first = make_queue("w1")
    (claim,) = first.claim(**AMPLE)
    commit(first, claim, 0, 1, 2, text="ab")
    first.release(claim.request_id, claim.epoch, undo=True)
    second = make_queue("w2")
    (again,) = second.claim(**AMPLE)
    assert again.token_ids == (1, 2)
    assert commit(first, claim, 2, 7, text="?") is Verdict.FENCED
    finish(second, again, 2, 3, text="c")
    (result,) = client.replies("mine").poll(1)
    assert (result.token_ids, result.text) == ((1, 2, 3), "abc")


def test_what_was_cut_short_keeps_what_it_has(client: Client, make_queue: MakeQueue) -> None:
    request_id = client.submit("x", reply_to="mine")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    commit(queue, claim, 0, 1, 2, text="ab")
    queue.release(claim.request_id, claim.epoch, undo=True)
    client.cancel(request_id)
    (result,) = client.replies("mine").poll(1)
    assert (result.finish_reason, result.text, result.token_ids) == ("cancelled", "ab", (1, 2))


def test_replies_stay_until_done_and_are_read_again(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    ids = [client.submit(text, reply_to="mine") for text in "ab"]
    for claim in queue.claim(**AMPLE):
        finish(queue, claim, 0, 1, text="!")
    assert [result.request_id for result in client.replies("mine").poll(1)] == ids
    again = client.replies("mine")
    assert [result.request_id for result in again.poll(1)] == ids
    again.done(ids[:1])
    assert [result.request_id for result in client.replies("mine").poll(1)] == ids[1:]
    again.done(ids)
    assert server.xlen(KEYS.reply("mine")) == 0
    assert 0 < server.pttl(KEYS.reply("mine")) <= 60_000


def test_a_reply_never_gets_an_id_that_its_reader_has_passed(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    """Within a millisecond of the last one, or by a clock that went back, a new stream would."""
    queue = make_queue()
    request_id = client.submit("a", reply_to="mine")
    for claim in queue.claim(**AMPLE):
        finish(queue, claim, 0, 1, text="!")
    entries: Any = server.xrange(KEYS.reply("mine"))
    client.replies("mine").done([request_id])
    stream: Any = server.xinfo_stream(KEYS.reply("mine"))
    assert stream["last-generated-id"] == entries[-1][0]


def test_result_waits_for_one_reply(client: Client, make_queue: MakeQueue) -> None:
    request_id = client.submit("x", reply_to="mine")
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        client.result(request_id, timeout_s=0.01)
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    finish(queue, claim, 0, 1, text="!")
    assert client.result(request_id).text == "!"
    client.replies("mine").done([request_id])
    with pytest.raises(NotFound, match="taken from mine"):
        client.result(request_id)


def test_it_cannot_be_followed(client: Client) -> None:
    request_id = client.submit("x", reply_to="mine")
    with pytest.raises(InvalidRequest, match="read its result"):
        next(client.follow(request_id))


def test_a_silence_shows_what_is_gone(
    client: Client, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.producer.collecting.MAX_BLOCK_S", 0.01)
    request_id = client.submit("x", reply_to="mine")
    replies = client.replies("mine")
    replies.add(request_id)
    assert replies.poll(0.02) == []
    assert replies.poll(0.02) == []  # it waits, and is known
    server.delete(KEYS.record(request_id))
    other = client.submit("y", reply_to="mine")
    replies.add(other)
    with pytest.raises(NotFound) as caught:
        replies.poll(0.02)
    assert caught.value.request_id == request_id
    assert len(replies) == 1
    client.cancel(other)
    assert [result.request_id for result in replies.poll(1)] == [other]


def test_a_lost_request_is_noticed_while_others_answer(
    client: Client, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmill.producer.collecting.CHECK_S", 0.0)
    replies = client.replies("mine")
    lost, waiting = (client.submit("x", reply_to="mine") for _ in range(2))
    replies.add(lost)
    replies.add(waiting)
    server.delete(KEYS.record(lost))
    others = [client.submit("x", reply_to="mine") for _ in range(2)]
    for request_id in others:
        client.cancel(request_id)
        assert [result.request_id for result in replies.poll(1)] == [request_id]
    with pytest.raises(NotFound) as caught:
        replies.poll(1)
    assert caught.value.request_id == lost
    assert len(replies) == 1


def test_a_silence_finds_what_came_behind_the_cursor(
    client: Client, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose clock was set back gives an entry an earlier id."""
    monkeypatch.setattr("tokenmill.producer.collecting.MAX_BLOCK_S", 0.01)
    request_id = client.submit("x", reply_to="mine")
    replies = client.replies("mine")
    replies.add(request_id)
    replies._cursors = dict.fromkeys(replies._cursors, "9999999999999-0")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    finish(queue, claim, 0, 1, text="!")
    found = [result for _ in range(3) for result in replies.poll(0.02)]
    assert [result.text for result in found] == ["!"]


def test_an_error_stays_known_after_its_reply_was_taken(
    client: Client, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x", reply_to="mine")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    end = Finish(
        request_id=request_id,
        epoch=claim.epoch,
        start=0,
        finish_reason="error",
        reason="too long",
        usage=Usage(prompt_tokens=0, completion_tokens=0),
    )
    queue.finish([end])
    client.replies("mine").done([request_id])
    assert client.result(request_id).reason == "too long"
