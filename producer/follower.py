"""`Follower`: reads the outputs of many requests in one blocking read, across reconnects."""

from tokenmill.producer.following import Following
from tokenmill.producer.shards import Shards
from tokenmill.producer.steps import run
from tokenmill.producer.transport import Transport
from tokenmill.producer.wire import Delta


class Follower(Following):
    """A set of followed requests; each leaves the set with its last delta. One thread at a time.

    The position in a stream is the number of tokens read, so that reading goes on exactly there
    after a lost connection or in another process.
    """

    def __init__(self, shards: Shards) -> None:
        """Followers may share the `shards`."""
        super().__init__(shards)
        self._perform = Transport(shards)

    def poll(self, timeout_s: float) -> list[Delta]:
        """What has come, waiting up to `timeout_s` for the first; may be empty.

        A server that does not answer is not an error: the call returns empty after a while, logs
        once, and the next goes on where this one was.

        Raises:
            NotFound: a followed request is not known, or its result has expired.
            OutputChanged: the output of one does not go on from what was read: the server has
                lost part of it. In both cases that one is followed no longer; the others are.
        """
        return run(self.polled(timeout_s), self._perform)
