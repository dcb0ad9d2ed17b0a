"""`Replies`: whole outputs of many requests, read from the one stream that they were sent to.

    replies = client.replies("nightly")
    client.submit(prompt, reply_to="nightly")
    for result in replies.poll(5.0): keep(result); replies.done([result.request_id])

An entry stays until `done`, so whoever dies before it reads it again.
"""

from collections.abc import Callable, Iterable
from typing import Any

from tokenmill.producer.collecting import Collecting
from tokenmill.producer.exchange import KEPT_S, Exchange
from tokenmill.producer.steps import Effect, run
from tokenmill.producer.wire import Result


class Replies(Collecting):
    """A reader of one reply stream; one thread at a time."""

    def __init__(self, exchange: Exchange, perform: Callable[[Effect], Any], name: str) -> None:
        """`perform` is a `Transport`."""
        super().__init__(exchange.layout, name)
        self.perform = perform
        self._exchange = exchange

    def poll(self, timeout_s: float) -> list[Result]:
        """What has come, waiting up to `timeout_s` for the first; may be empty.

        Results that nobody awaits come too: an earlier reader of the stream left them.
        A server that does not answer is not an error, as for `Follower.poll`.

        Raises:
            NotFound: an awaited request is not known, or its reply is gone. That one is awaited no
                longer; the others are.
        """
        return run(self.polled(timeout_s), self.perform)

    def done(self, request_ids: Iterable[str]) -> None:
        """Delete the replies of these requests: their reader has kept them."""
        run(self._exchange.forget(tuple(request_ids), KEPT_S), self.perform)
