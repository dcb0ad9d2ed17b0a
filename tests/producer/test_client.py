"""The client against real servers, with workers played by the test."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tokenmill.producer.client import REDIS_URL, Client
from tokenmill.producer.errors import (
    Busy,
    Conflict,
    InvalidRequest,
    NotFound,
    OutputChanged,
    ServerUnreachable,
)
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator
from tokenmill.producer.params import choice_seed, derived_seed
from tokenmill.producer.request_id import new_request_id, request_id_for
from tokenmill.producer.scripts import Script
from tokenmill.producer.wire import Request, Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish, Queue

pytestmark = pytest.mark.everywhere

AMPLE = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}
MakeQueue = Callable[..., Queue]


@pytest.fixture
def client(either_client: Client) -> Client:
    return either_client


def append(
    queue: Queue, claim: Claim, start: int, *token_ids: int, before: tuple[int, ...] = ()
) -> None:
    """`before` are the tokens up to `start`."""
    piece = Append(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=token_ids,
        text="".join(map(chr, token_ids)),
        digest=chain_digest("", before + token_ids),
    )
    queue.append([piece])


def finish(queue: Queue, claim: Claim, start: int) -> None:
    usage = Usage(prompt_tokens=2, completion_tokens=start)
    end = Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        finish_reason="stop",
        usage=usage,
    )
    queue.finish([end])


def test_submit_sends_what_new_request_builds(client: Client, make_queue: MakeQueue) -> None:
    fields: dict[str, Any] = {"priority": 0, "model": "m", "metadata": {"row": "1"}, "seed": 5}
    request_id = client.submit([{"role": "user", "content": "hi"}], max_tokens=3, **fields)
    [claim] = make_queue().claim(**AMPLE)
    built = client.new_request(
        [{"role": "user", "content": "hi"}], max_tokens=3, request_id=request_id, **fields
    )
    assert claim.request.fingerprint == built.fingerprint
    assert claim.request.params.seed == 5
    assert abs(claim.request.deadline_ms - built.deadline_ms) < 60_000


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokenz": 3}, "max_tokenz"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": 31 * 86_400}, "deadline_s"),
        ({"request_id": ""}, "request_id"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_sent(
    client: Client, server: redis.Redis, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest, match="must be") as caught:
        client.submit("x", **fields)
    assert caught.value.field == field
    assert set(server.keys()) <= {Keys().shards.encode()}


def test_choices_are_requests_with_seeds_of_their_own(client: Client) -> None:
    first_id = request_id_for("mine")
    requests = client.new_choices("x", n=3, request_id=first_id, temperature=1.0)
    assert requests[0].request_id == first_id
    assert requests[0].params.seed is None  # the worker derives it from the id
    seeds = [request.params.seed for request in requests[1:]]
    assert seeds == [choice_seed(derived_seed(first_id), choice) for choice in (1, 2)]
    again = client.new_choices("x", n=3, request_id=first_id, temperature=1.0)
    assert [r.request_id for r in again] == [r.request_id for r in requests]
    assert [r.fingerprint for r in again] == [r.fingerprint for r in requests]
    assert len(set(client.submit_many(requests))) == 3


def test_a_repeat_is_a_no_op_and_another_content_a_conflict(
    client: Client, server: redis.Redis
) -> None:
    request_id = new_request_id()
    assert client.submit("x", request_id=request_id) == request_id
    assert client.submit("x", request_id=request_id) == request_id
    assert server.xlen(Keys().lane(1, "default")) == 1
    with pytest.raises(Conflict, match="choose another id"):
        client.submit("y", request_id=request_id)


def test_a_full_queue_refuses_and_says_when_to_come_back(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    Operator(server, Keys()).configure(max_live=2)
    requests = [client.new_request(f"{number}") for number in range(3)]
    with pytest.raises(Busy, match="2 requests of this call were accepted") as caught:
        client.submit_many(requests)
    assert 1.0 <= caught.value.retry_after_s <= 2.0
    assert server.zcard(Keys().live) == 2
    finish(queue, queue.claim(**AMPLE)[0], 0)
    assert client.submit_many(requests) == [request.request_id for request in requests]


def test_submit_many_goes_in_batches_by_number_and_size(
    client: Client, server: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    steps = Script.steps

    def counted(self: Script, shard: int, tag: str, arguments: list[Any]) -> Any:
        calls.append(len(arguments) // 9)
        return steps(self, shard, tag, arguments)

    monkeypatch.setattr(Script, "steps", counted)
    client.submit_many(client.new_request("x") for _ in range(150))
    client.submit_many(client.new_request("x" * 2_000_000) for _ in range(3))
    assert calls == [64, 64, 22, 2, 1]
    assert server.zcard(Keys().live) == 153


def test_follow_reads_from_any_offset_and_ends(client: Client, make_queue: MakeQueue) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    [claim] = queue.claim(**AMPLE)
    append(queue, claim, 0, 65, 66)
    deltas = client.follow(request_id)
    first = next(deltas)
    assert (first.start, first.token_ids, first.text, first.finish_reason) == (
        0,
        (65, 66),
        "AB",
        "",
    )
    append(queue, claim, 2, 67, before=(65, 66))
    assert next(deltas).token_ids == (67,)
    finish(queue, claim, 3)
    last = next(deltas)
    assert (last.start, last.token_ids, last.finish_reason) == (3, (), "stop")
    assert last.usage == Usage(prompt_tokens=2, completion_tokens=3)
    assert list(deltas) == []
    assert [delta.text for delta in client.follow(request_id, start=first.end)] == ["C", ""]
    with pytest.raises(InvalidRequest, match="start must be at most 3"):
        next(client.follow(request_id, start=4))
    with pytest.raises(NotFound, match="wrong id"):
        next(client.follow(new_request_id()))
    with pytest.raises(InvalidRequest, match="request_id must be"):
        next(client.follow("nonsense"))


def test_result_waits_for_the_end(client: Client, echo_worker: None) -> None:
    assert client.result(client.submit("hello"), timeout_s=30).text == "hello"
    assert client.result(client.submit("again")).text == "again"


def test_result_times_out(client: Client) -> None:
    with pytest.raises(TimeoutError, match=r"not ended within 0\.01 s"):
        client.result(client.submit("x"), timeout_s=0.01)
    with pytest.raises(NotFound, match="wrong id"):
        client.result(new_request_id(), timeout_s=1)


def test_follow_many_mixes_streams_in_order(client: Client, echo_worker: None) -> None:
    texts = {client.submit(f"text {number}"): f"text {number}" for number in range(10)}
    seen = dict.fromkeys(texts, "")
    ends = {}
    for delta in client.follow_many(texts):
        assert delta.start == len(seen[delta.request_id])
        seen[delta.request_id] += delta.text
        if delta.finish_reason:
            ends[delta.request_id] = delta.finish_reason
    assert seen == texts
    assert set(ends.values()) == {"stop"}
    assert len(ends) == 10


@pytest.mark.parametrize("ordered", [True, False])
def test_map_answers_every_prompt(client: Client, echo_worker: None, ordered: bool) -> None:
    prompts = [f"prompt {number}" for number in range(30)]
    texts = [result.text for result in client.map(prompts, window=7, ordered=ordered)]
    assert (texts if ordered else sorted(texts)) == (prompts if ordered else sorted(prompts))


def test_map_keeps_to_its_window_and_cancels_what_it_leaves(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    made = []

    def prompts() -> Any:
        for number in range(100):
            made.append(number)
            # Answer the first as soon as the window is full, so that the loop has something.
            if number == 3:
                finish(queue, queue.claim(**AMPLE, limit=1)[0], 0)
            yield f"{number}"

    results = client.map(prompts(), window=5)
    assert next(results).finish_reason == "stop"
    assert len(made) == 5
    assert server.zcard(Keys().live) == 4
    results.close()  # type: ignore[attr-defined]
    assert server.zcard(Keys().live) == 0
    with pytest.raises(InvalidRequest, match="window must be"):
        next(client.map([], window=0))


def test_map_waits_for_a_full_queue(client: Client, server: redis.Redis, echo_worker: None) -> None:
    Operator(server, Keys()).configure(max_live=1)
    assert [result.text for result in client.map(["a", "b"], window=2)] == ["a", "b"]


def test_cancel_says_what_it_did(client: Client, make_queue: MakeQueue) -> None:
    queue = make_queue()
    ended, waiting = client.submit("x"), client.submit("y")
    finish(queue, queue.claim(**AMPLE, limit=1)[0], 0)
    assert client.cancel(ended) is False
    assert client.cancel(waiting) is True
    with pytest.raises(NotFound, match="no request"):
        client.cancel(new_request_id())


def test_the_url_comes_from_the_environment(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REDIS_URL, server_url)
    with Client() as client:
        assert client.url == server_url
        assert client.workers() == []


def test_an_enqueue_survives_a_crash_and_a_follower_goes_on(
    own_server: Any, make_request: Callable[..., Request], caplog: pytest.LogCaptureFixture
) -> None:
    with Client(own_server.url) as client:
        client._shards.server(0).config_set("appendfsync", "always")
        queue = Queue(client._shards.server(0), Keys(), "w")
        request_id = client.submit("x")
        [claim] = queue.claim(**AMPLE)
        append(queue, claim, 0, 65)
        follower = client.follower()
        follower.add(request_id)
        assert [delta.text for delta in follower.poll(5)] == ["A"]
        own_server.kill()
        with pytest.raises(ServerUnreachable, match="does not answer"):
            client.submit("y")
        assert follower.poll(0.01) == []
        assert follower.poll(0.01) == []
        own_server.start()
        append(queue, claim, 0, 65)  # a repeat of what was committed before the crash
        append(queue, claim, 1, 66, before=(65,))
        finish(queue, claim, 2)
        assert [delta.text for delta in follower.poll(5)] == ["B", ""]
        assert client.result(request_id, timeout_s=5).text == "AB"
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "server_lost",
        "server_back",
    ]


def test_out_of_memory_refuses_new_work_and_ends_the_old(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    [claim] = queue.claim(**AMPLE)
    server.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(Busy, match="out of memory"):
            client.submit("y")
        append(queue, claim, 0, 65)
        finish(queue, claim, 1)
    finally:
        server.config_set("maxmemory", "0")
    assert client.result(request_id, timeout_s=5).text == "A"


def test_a_long_output_that_has_ended_does_not_time_out(client: Client, echo_worker: None) -> None:
    request_id = client.submit("x" * 400)  # 200 deltas: more than one read takes
    client.result(request_id)
    assert client.result(request_id, timeout_s=0).text == "x" * 400


def test_a_shard_that_is_not_served_is_refused(
    client: Client, server: redis.Redis, make_request: Callable[..., Request]
) -> None:
    elsewhere = new_request_id(shard=3)
    with pytest.raises(InvalidRequest, match="request_id must be an id of shard 0"):
        client.submit("x", request_id=elsewhere)
    with pytest.raises(InvalidRequest, match="request_id must be an id of shard 0"):
        client.submit_many([make_request(request_id=elsewhere)])
    assert set(server.keys()) <= {Keys().shards.encode()}


def test_a_repeat_may_have_another_priority(client: Client, server: redis.Redis) -> None:
    request_id = client.submit("x", priority=1)
    assert client.submit("x", priority=0, request_id=request_id) == request_id
    assert server.zcard(Keys().live) == 1


def test_follow_tells_of_an_output_that_changed(client: Client, make_queue: MakeQueue) -> None:
    """The first delta was read, then the server lost it and got another in its place."""
    request_id = client.submit("x")
    queue = make_queue()
    [claim] = queue.claim(**AMPLE)
    append(queue, claim, 0, 65)
    deltas = client.follow(request_id)
    assert next(deltas).text == "A"
    append(queue, claim, 1, 67, before=(66,))
    with pytest.raises(OutputChanged, match=r"up to token 1; .*read it again") as caught:
        next(deltas)
    assert caught.value.request_id == request_id


def test_forget_shortens_what_has_ended_well(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    done, runs = client.submit("x"), client.submit("y")
    first, _second = queue.claim(**AMPLE)
    finish(queue, first, 0)
    client.forget([done, runs, new_request_id()], within_s=60)
    for key in (Keys().record(done), Keys().output(done)):
        assert 0 < server.pttl(key) <= 60_000
    assert server.pttl(Keys().record(runs)) == -1
    client.forget([done], within_s=6000)
    assert server.pttl(Keys().record(done)) <= 60_000
    assert client.live() == 1


def test_forget_keeps_dead_letters(
    client: Client, server: redis.Redis, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    request_id = client.submit("x")
    [claim] = queue.claim(**AMPLE)
    usage = Usage(prompt_tokens=0, completion_tokens=0)
    end = Finish(
        request_id=request_id,
        epoch=claim.epoch,
        start=0,
        finish_reason="error",
        reason="broken",
        usage=usage,
    )
    queue.finish([end])
    client.forget([request_id], within_s=60)
    assert server.pttl(Keys().record(request_id)) > 60_000


@pytest.mark.parametrize("ahead_s", [-7200, 7200])
def test_a_deadline_counts_by_the_server_whatever_the_producers_clock_says(
    server_url: str, server: redis.Redis, ahead_s: int
) -> None:
    with Client(server_url) as client:
        client._exchange.clock = lambda: time.time() + ahead_s
        request_id = client.submit("x", deadline_s=60)
    seconds, micros = server.time()
    due_ms = server.zscore(Keys().live, request_id)
    assert isinstance(due_ms, float)
    assert 30_000 < due_ms - 1000 * seconds - micros / 1000 <= 60_000
    assert server.hget(Keys().record(request_id), "deadline") == b"%d" % due_ms
