"""What `Client.map` does not show of it: a full queue, and leaving while the server is gone."""

from collections.abc import Callable, Iterator

import pytest

from tokenmill.producer.client import Client
from tokenmill.producer.errors import Busy, ServerUnreachable
from tokenmill.producer.follower import Follower
from tokenmill.producer.keys import Keys
from tokenmill.producer.window import Window
from tokenmill.producer.wire import Request, Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish, Queue


class Full:
    """A client that has no room, or no server, for the first `refusals` submits."""

    def __init__(self, client: Client, refusals: int, *, is_lost: bool = False) -> None:
        self.client = client
        self.refusals = refusals
        self.is_lost = is_lost
        self.sent: list[str] = []
        self.cancelled: list[str] = []

    def submit_many(self, requests: list[Request]) -> list[str]:
        if self.refusals:
            self.refusals -= 1
            if self.is_lost:
                raise ServerUnreachable("gone")
            raise Busy("full", retry_after_s=0.01)
        self.sent += [request.request_id for request in requests]
        return self.client.submit_many(requests)

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        raise ServerUnreachable("gone")

    def follower(self) -> Follower:
        return self.client.follower()


@pytest.fixture
def requests(make_request: Callable[..., Request]) -> list[Request]:
    return [make_request(f"text {number}") for number in range(6)]


def test_a_refused_request_is_sent_again_and_only_once(
    client: Client, requests: list[Request], echo_worker: None
) -> None:
    full = Full(client, refusals=3)
    window = Window(full, iter(requests), size=2, ordered=True)
    assert [result.text for result in window.results()] == [item.prompt for item in requests]
    assert full.sent == [item.request_id for item in requests]
    assert full.cancelled == []


def test_no_more_in_flight_than_the_window(
    client: Client, requests: list[Request], echo_worker: None
) -> None:
    full = Full(client, refusals=0)
    taken = 0
    for _ in Window(full, iter(requests), size=2, ordered=True).results():
        taken += 1
        assert len(full.sent) <= taken + 2
    assert taken == 6


def test_an_unordered_result_does_not_wait_for_the_first(
    client: Client, requests: list[Request]
) -> None:
    full = Full(client, refusals=0)

    def cancelled_later() -> Iterator[Request]:
        yield from requests
        client.cancel(requests[4].request_id)

    results = Window(full, cancelled_later(), size=7, ordered=False).results()
    assert next(results).request_id == requests[4].request_id


def test_leaving_early_cancels_and_hides_no_error(client: Client, requests: list[Request]) -> None:
    full = Full(client, refusals=0)

    def broken() -> Iterator[Request]:
        yield from requests[:2]
        raise KeyError("row 3")

    with pytest.raises(KeyError, match="row 3"):
        next(Window(full, broken(), size=6, ordered=False).results())
    # There is no server: asking again for each would take its time-out each.
    assert full.cancelled == [requests[0].request_id]


def test_a_lost_server_is_waited_for(
    client: Client,
    requests: list[Request],
    echo_worker: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tokenmill.producer.window._RETRY_S", 0.01)
    lost = Full(client, refusals=3, is_lost=True)
    window = Window(lost, iter(requests), size=2, ordered=True)
    assert [result.text for result in window.results()] == [item.prompt for item in requests]
    assert lost.cancelled == []


def test_an_output_that_changed_is_read_anew(
    client: Client, requests: list[Request], make_queue: Callable[..., Queue]
) -> None:
    """One token was read, then the server lost it and got another in its place."""
    queue = make_queue()
    request = requests[0]
    window = Window(client, iter([request]), size=2, ordered=True)
    window._fill()
    [claim] = queue.claim(sequences=1, tokens=10_000, kv_tokens=100_000)
    queue.append([piece(claim, 0, (65,), "A")])
    window._collect()
    client._server.delete(Keys().output(request.request_id))
    client._server.hset(Keys().record(request.request_id), "offset", 0)
    queue.append([piece(claim, 0, (66, 67), "BC")])
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    end = Finish(
        request_id=claim.request_id, epoch=claim.epoch, start=2, finish_reason="stop", usage=usage
    )
    queue.finish([end])
    assert [result.text for result in window.results()] == ["BC"]


def piece(claim: Claim, start: int, token_ids: tuple[int, ...], text: str) -> Append:
    return Append(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=token_ids,
        text=text,
        digest=chain_digest("", token_ids),
    )
