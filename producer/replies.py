"""`Replies`: whole outputs of many requests, read from the one stream that they were sent to.

    replies = client.replies("nightly")
    client.submit(prompt, reply_to="nightly")
    for result in replies.poll(5.0): keep(result); replies.done([result.request_id])

An entry stays until `done`, so whoever dies before it reads it again.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import NotFound
from tokenmill.producer.follower import Silence
from tokenmill.producer.keys import Keys
from tokenmill.producer.logprobs import unpack_logprobs
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import Result, Usage, check_name, unpack_token_ids

#: Entries taken by one read.
_ENTRIES = 256


class Replies:
    """A reader of one reply stream; one thread at a time."""

    def __init__(
        self,
        shards: Shards,
        name: str,
        forget: Callable[[Sequence[str]], None],
    ) -> None:
        """`forget` is `Client.forget`."""
        self.name = check_name("reply_to", name)
        self._shards = shards
        self._reader = shards.reader()
        self._forget = forget
        #: Of each shard's stream, the id of the last entry read.
        self._cursors: dict[Any, Any] = {keys.reply(name): "0-0" for keys in shards.keys}
        #: Requests whose reply is awaited: looked after in a silence.
        self._awaited: set[str] = set()
        self._silence = Silence()
        self._heard = time.monotonic()

    def __len__(self) -> int:
        return len(self._awaited)

    def add(self, request_id: str) -> None:
        """Await a reply: `poll` raises if the server no longer knows the request."""
        self._awaited.add(request_id)

    def remove(self, request_id: str) -> None:
        """Await it no longer; an id that is not awaited is no error."""
        self._awaited.discard(request_id)

    def poll(self, timeout_s: float) -> list[Result]:
        """What has come, waiting up to `timeout_s` for the first; may be empty.

        Results that nobody awaits come too: an earlier reader of the stream left them.
        A server that does not answer is not an error, as for `Follower.poll`.

        Raises:
            NotFound: an awaited request is not known, or its reply is gone.
        """
        try:
            results = self._read(timeout_s)
            if not results and time.monotonic() - self._heard >= MAX_BLOCK_S:
                results = self._look_after()
        except (RedisConnectionError, RedisTimeoutError) as error:
            self._silence.lost(error, timeout_s)
            return []
        self._silence.back()
        for result in results:
            self._awaited.discard(result.request_id)
        if results:
            self._heard = time.monotonic()
        return results

    def done(self, request_ids: Iterable[str]) -> None:
        """Delete the replies of these requests: their reader has kept them."""
        self._forget(tuple(request_ids))

    def _read(self, timeout_s: float) -> list[Result]:
        block_ms = max(int(min(timeout_s, MAX_BLOCK_S) * 1000), 1)  # 0 would block for ever
        reply: Any = self._reader.xread(self._cursors, count=_ENTRIES, block=block_ms)
        results: list[Result] = []
        for name, entries in reply or ():
            self._cursors[name.decode()] = entries[-1][0].decode()
            results += (result_of(fields) for _, fields in entries)
        return results

    def _look_after(self) -> list[Result]:
        """After a silence: what is awaited may have ended behind the cursor, or be gone."""
        self._heard = time.monotonic()
        found = []
        for request_id in tuple(self._awaited):
            keys = self._shards.keys_of(request_id)
            result = ended_result(self._shards.server_of(request_id), keys, request_id)
            if result is not None:
                found.append(result)
        return found


def ended_result(server: redis.Redis, keys: Keys, request_id: str) -> Result | None:
    """The output of a request with a reply stream, or None while it has not ended.

    Raises:
        NotFound: there is no such request, or its reply was taken or has expired.
    """
    record: Any = server.hmget(
        keys.record(request_id), "state", "reply", "at", "finish", "reason", "offset"
    )
    state, name, at, finish, reason, offset = (item.decode() if item else "" for item in record)
    if not state:
        raise NotFound(f"no request {request_id} in this queue: a wrong id, or its result expired")
    if state != "end":
        return None
    entries: Any = server.xrange(keys.reply(name), at, at) if at else []
    if entries:
        return result_of(entries[0][1])
    if finish != "error":
        raise NotFound(f"the reply of request {request_id} was taken from {name}, or has expired")
    return Result(
        request_id=request_id,
        token_ids=(),
        text="",
        finish_reason=finish,
        reason=reason,
        usage=Usage(prompt_tokens=0, completion_tokens=int(offset)),
    )


def result_of(fields: dict[bytes, bytes]) -> Result:
    """The result in an entry of a reply stream."""
    logprobs, of_prompt = unpack_logprobs(fields.get(b"l", b""))
    return Result(
        request_id=fields[b"id"].decode(),
        token_ids=unpack_token_ids(fields[b"t"]),
        text=fields[b"x"].decode(),
        finish_reason=fields[b"f"].decode(),
        reason=fields[b"y"].decode(),
        usage=Usage(prompt_tokens=int(fields[b"p"]), completion_tokens=int(fields[b"c"])),
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
    )
