"""What `Client.map` does not show of it: a full queue, and leaving while the server is gone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, Conflict, NotFound, ServerUnreachable
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator
from tokenmill.producer.steps import Sleep, Steps, run
from tokenmill.producer.window import Window
from tokenmill.producer.wire import Request, Usage
from tokenmill.worker.queue import Finish, Queue

pytestmark = pytest.mark.placed("")

NAME = "a-run"
AMPLE: dict[str, Any] = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}


class Full:
    """A client that has no room, or no server, for the first `refusals` submits."""

    def __init__(self, client: Client, refusals: int, *, is_lost: bool = False) -> None:
        self.client = client
        self.refusals = refusals
        self.is_lost = is_lost
        self.sent: list[str] = []
        self.cancelled: list[str] = []

    def submit_many(self, requests: Iterable[Request]) -> Steps[list[str]]:
        requests = list(requests)
        if self.refusals:
            self.refusals -= 1
            if self.is_lost:
                raise ServerUnreachable("gone")
            raise Busy("full", retry_after_s=0.01)
        self.sent += [request.request_id for request in requests]
        return (yield from self.client._exchange.submit_many(requests))

    def cancel(self, request_id: str) -> Steps[bool]:
        self.cancelled.append(request_id)
        yield Sleep(0)
        raise ServerUnreachable("gone")

    def forget(self, request_ids: Sequence[str], within_s: float) -> Steps[None]:
        return self.client._exchange.forget(request_ids, within_s)


@pytest.fixture
def requests(make_request: Callable[..., Request]) -> list[Request]:
    return [make_request(f"text {number}", reply_to=NAME) for number in range(6)]


def test_a_refused_request_is_sent_again_and_only_once(
    client: Client, requests: list[Request], echo_worker: None
) -> None:
    full = Full(client, refusals=3)
    window = Window(full, iter(requests), client.replies(NAME), size=2, ordered=True)
    assert [result.text for result in window.results()] == [item.prompt for item in requests]
    assert full.sent == [item.request_id for item in requests]
    assert full.cancelled == []


def test_no_more_in_flight_than_the_window(
    client: Client, requests: list[Request], echo_worker: None
) -> None:
    full = Full(client, refusals=0)
    taken = 0
    for _ in Window(full, iter(requests), client.replies(NAME), size=2, ordered=True).results():
        taken += 1
        assert len(full.sent) <= taken + 2
    assert taken == 6


def test_an_unordered_result_does_not_wait_for_the_first(
    client: Client, requests: list[Request]
) -> None:
    window = Window(client._exchange, iter(requests), client.replies(NAME), size=7, ordered=False)
    run(window._fill(), window._perform)
    client.cancel(requests[4].request_id)
    assert next(window.results()).request_id == requests[4].request_id


def test_leaving_early_cancels_what_is_in_flight(client: Client, requests: list[Request]) -> None:
    full = Full(client, refusals=0)
    window = Window(full, iter(requests), client.replies(NAME), size=7, ordered=False)
    run(window._fill(), window._perform)
    client.cancel(requests[4].request_id)
    results = window.results()
    next(results)
    results.close()  # type: ignore[attr-defined]
    # There is no server: asking again for each would take its time-out each.
    assert full.cancelled == [requests[0].request_id]


def test_an_error_of_the_source_is_not_hidden(client: Client, requests: list[Request]) -> None:
    def broken() -> Iterator[Request]:
        yield from requests[:2]
        raise KeyError("row 3")

    with pytest.raises(KeyError, match="row 3"):
        next(
            Window(
                client._exchange, broken(), client.replies(NAME), size=6, ordered=False
            ).results()
        )


def test_a_lost_server_is_waited_for(
    client: Client,
    requests: list[Request],
    echo_worker: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokenmill.producer.window._RETRY_S", 0.01)
    lost = Full(client, refusals=3, is_lost=True)
    window = Window(lost, iter(requests), client.replies(NAME), size=2, ordered=True)
    assert [result.text for result in window.results()] == [item.prompt for item in requests]
    assert lost.cancelled == []


def test_replies_are_deleted_once_taken(
    client: Client, server: redis.Redis, requests: list[Request], echo_worker: None
) -> None:
    window = Window(client._exchange, iter(requests), client.replies(NAME), size=6, ordered=False)
    assert len(list(window.results())) == 6
    assert server.xlen(Keys().reply(NAME)) == 0
    assert server.ttl(Keys().record(requests[0].request_id)) <= 600


@pytest.fixture
def partly(
    client: Client, server: redis.Redis, make_request: Callable[..., Request]
) -> tuple[Window, list[Request]]:
    """A window with 20 requests and a quota of 10: of its last batch a part was accepted."""
    Operator(server, Keys()).configure(quotas={"default": 10})
    requests = [make_request(f"text {number}", reply_to=NAME) for number in range(20)]
    replies = client.replies(NAME)
    window = Window(client._exchange, iter(requests), replies, size=20, ordered=True)
    window._clock = lambda: 0.0
    run(window._fill(), window._perform)
    assert client.live() == 10
    assert len(window._results) < 10
    return window, requests


def test_leaving_early_cancels_what_was_accepted_of_a_batch(
    client: Client, partly: tuple[Window, list[Request]]
) -> None:
    window, requests = partly
    client.cancel(requests[0].request_id)
    results = window.results()
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert client.live() == 0


def test_what_was_interrupted_while_it_was_sent_is_cancelled(
    client: Client, requests: list[Request]
) -> None:
    window = Window(client._exchange, iter(requests), client.replies(NAME), size=6, ordered=True)

    def interrupted(effect: Any) -> Any:
        window._perform(effect)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(window._fill(), interrupted)
    assert client.live() == 1
    run(window.cancel(), window._perform)
    assert client.live() == 0


def test_an_answer_before_the_batch_was_accepted_is_kept(
    partly: tuple[Window, list[Request]], make_queue: Callable[..., Queue]
) -> None:
    window, requests = partly
    queue = make_queue()
    for claim in queue.claim(**AMPLE, limit=100):
        end = Finish(
            request_id=claim.request_id,
            epoch=claim.epoch,
            start=0,
            finish_reason="stop",
            usage=Usage(prompt_tokens=1, completion_tokens=0),
        )
        queue.finish([end])
    run(window._collect(), window._perform)
    window._clock = lambda: 1e9
    run(window._fill(), window._perform)
    ended = [result.request_id for result in window.take()]
    assert ended == [request.request_id for request in requests[:10]]


@pytest.fixture
def _quick_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.producer.collecting.MAX_BLOCK_S", 0.01)
    monkeypatch.setattr("tokenmill.producer.window.MAX_BLOCK_S", 0.01)


def lose(server: redis.Redis, request: Request) -> None:
    """As a server does that comes back without its last second."""
    keys = Keys()
    server.delete(keys.record(request.request_id))
    server.zrem(keys.live, request.request_id)


@pytest.mark.usefixtures("_quick_to_look")
def test_lost_requests_are_sent_again(
    client: Client,
    server: redis.Redis,
    requests: list[Request],
    make_queue: Callable[..., Queue],
) -> None:
    window = Window(client._exchange, iter(requests), client.replies(NAME), size=7, ordered=True)
    run(window._fill(), window._perform)
    for request in requests[2:4]:
        lose(server, request)
    while any(not server.exists(Keys().record(request.request_id)) for request in requests):
        run(window.turn(), window._perform)
    for request in requests:
        client.cancel(request.request_id)
    ended = [result.request_id for result in window.results()]
    assert ended == [request.request_id for request in requests]


@pytest.mark.usefixtures("_quick_to_look")
def test_a_request_that_is_lost_again_and_again_is_an_error(
    client: Client, server: redis.Redis, requests: list[Request]
) -> None:
    window = Window(
        client._exchange, iter(requests[:1]), client.replies(NAME), size=1, ordered=True
    )

    def lose_it_always() -> None:
        for _ in range(100):
            run(window.turn(), window._perform)
            lose(server, requests[0])

    with pytest.raises(NotFound) as caught:
        lose_it_always()
    assert caught.value.request_id == requests[0].request_id
    assert window._resent[requests[0].request_id] == 3


def test_the_request_of_somebody_else_is_not_cancelled(
    client: Client, make_request: Callable[..., Request]
) -> None:
    theirs = make_request("theirs")
    client.submit_many([theirs])
    ours = make_request("ours", request_id=theirs.request_id, reply_to=NAME)
    window = Window(client._exchange, iter([ours]), client.replies(NAME), size=6, ordered=True)
    with pytest.raises(Conflict):
        next(window.results())
    assert client.live() == 1
