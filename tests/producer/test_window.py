"""What `Client.map` does not show of it: a full queue, and leaving while the server is gone."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import redis

from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, ServerUnreachable
from tokenmill.producer.keys import Keys
from tokenmill.producer.steps import Sleep, Steps, run
from tokenmill.producer.window import Window
from tokenmill.producer.wire import Request

NAME = "a-run"


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
