"""`Following`: outputs of many requests, read at once: positions, digests and what is missing."""

import logging
import time
from collections.abc import Iterable
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tokenmill.producer.connection import MAX_BLOCK_S
from tokenmill.producer.errors import InvalidRequest, NotFound, OutputChanged
from tokenmill.producer.logprobs import unpack_logprobs
from tokenmill.producer.shards import Layout
from tokenmill.producer.steps import Calls, Read, Sleep, Steps
from tokenmill.producer.wire import Delta, Usage, chain_digest, unpack_token_ids

SERVER_LOST = "server_lost"
SERVER_BACK = "server_back"
#: Entries of one request taken by one read: a long output does not hold up the others.
_ENTRIES = 64
_BACKOFF_S = (0.05, 2.0)
#: How often those are looked after that said nothing while others did.
CHECK_S = 30.0

log = logging.getLogger(__name__)


class Silence:
    """The server does not answer a reader: said once, and the tries grow rarer."""

    def __init__(self) -> None:
        self._failures = 0

    def lost(self, error: Exception, timeout_s: float) -> Sleep:
        """A read failed: what to do before the next, for up to `timeout_s`."""
        if not self._failures:
            log.warning("%s: %s; retrying until it is back", SERVER_LOST, error)
        low, high = _BACKOFF_S
        pause_s = min(low * 2 ** min(self._failures, 10), high, max(timeout_s, 0.0))
        self._failures += 1
        return Sleep(pause_s)

    def back(self) -> None:
        """A read was answered."""
        if self._failures:
            self._failures = 0
            log.warning(SERVER_BACK)


class Following:
    """A set of followed requests; each leaves the set with its last delta. One thread at a time.

    The position in a stream is the number of tokens read, so that reading goes on exactly there
    after a lost connection or in another process.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        #: Stream key -> id of the last entry read, "<tokens>-0".
        self._cursors: dict[Any, Any] = {}
        self._ids: dict[str, str] = {}
        #: Stream key -> digest of all tokens read; None where reading began in the middle.
        self._digests: dict[str, str | None] = {}
        #: What is gone, or no longer goes on from what was read: told by the next polls.
        self._changed: list[OutputChanged | NotFound] = []
        self._silence = Silence()
        self._heard = self._checked = time.monotonic()
        #: Stream keys that gave nothing since the last check.
        self._unheard: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids) + len(self._changed)

    def add(self, request_id: str, start: int = 0, *, digest: str = "") -> None:
        """Follow a request from the token offset `start`, 0 or the `end` of a delta.

        With the `digest` of that delta it is noticed if the tokens before `start` have changed.
        """
        if start < 0:
            raise InvalidRequest("start", "a token offset of at least 0", start)
        key = self._layout.keys_of(request_id).output(request_id)
        self._ids[key] = request_id
        self._cursors[key] = f"{start}-0"
        self._digests[key] = (digest or None) if start else ""
        self._unheard.discard(key)

    def remove(self, request_id: str) -> None:
        """Follow it no longer; an id that is not followed is no error."""
        self._forget(self._layout.keys_of(request_id).output(request_id))
        self._changed = [item for item in self._changed if item.request_id != request_id]

    def polled(self, timeout_s: float) -> Steps[list[Delta]]:
        """`Follower.poll`, as steps."""
        if self._changed:
            raise self._changed.pop(0)
        if not self._cursors:
            return []
        try:
            deltas = yield from self._read(timeout_s)
            if not deltas and time.monotonic() - self._heard >= MAX_BLOCK_S:
                self._heard = time.monotonic()
                yield from self._check(tuple(self._ids))
            elif time.monotonic() - self._checked >= CHECK_S:
                self._checked = time.monotonic()
                yield from self._check(tuple(self._unheard))
                self._unheard = set(self._ids)
        except (RedisConnectionError, RedisTimeoutError) as error:
            yield self._silence.lost(error, timeout_s)
            return []
        self._silence.back()
        if self._changed and not deltas:
            raise self._changed.pop(0)
        return deltas

    def _read(self, timeout_s: float) -> Steps[list[Delta]]:
        # To the server, 0 would mean to block for ever.
        block_ms = max(int(min(timeout_s, MAX_BLOCK_S) * 1000), 1)
        reply: Any = yield Read(self._cursors, _ENTRIES, block_ms)
        deltas = []
        for name, entries in reply or ():
            key = name.decode()
            self._unheard.discard(key)
            for entry_id, fields in entries:
                delta = _delta(self._ids[key], entry_id.decode(), fields)
                if not self._goes_on(key, delta):
                    self._give_up(key)
                    break
                deltas.append(delta)
                if delta.finish_reason:
                    self._forget(key)
                    break
                self._cursors[key] = entry_id.decode()
        if deltas:
            self._heard = time.monotonic()
        return deltas

    def _goes_on(self, key: str, delta: Delta) -> bool:
        """Whether a delta continues what was read; notes its digest."""
        before = self._digests[key]
        self._digests[key] = delta.digest or None
        if delta.start != self._position(key):  # split otherwise: its text cannot be cut to fit
            return False
        if before is None:  # begun in the middle: there is no digest to compare with
            return True
        return delta.digest in ("", chain_digest(before, delta.token_ids))

    def _position(self, key: str) -> int:
        return int(self._cursors[key].partition("-")[0])

    def _give_up(self, key: str) -> None:
        self._changed.append(OutputChanged(self._ids[key], self._position(key)))
        self._forget(key)

    def _check(self, keys: Iterable[str]) -> Steps[None]:
        """After a silence: whether what is followed is still there, and can still say something."""
        names = {key: self._ids[key] for key in keys}
        followed = self._layout.split((name, (key, name)) for key, name in names.items())
        rows: list[tuple[tuple[str, str], Any]] = []
        for number, some in followed.items():
            records = [self._layout.keys[number].record(request_id) for _, request_id in some]
            calls = tuple(("hmget", (record, ["state", "offset"])) for record in records)
            replies: list[Any] = yield Calls(number, calls)
            rows += zip(some, replies, strict=True)
        for (key, request_id), (state, offset) in rows:
            try:
                check_position(request_id, self._position(key), state, offset)
            except InvalidRequest:  # it ended before what was read of it
                self._give_up(key)
            except NotFound as error:
                self._changed.append(error)
                self._forget(key)

    def _forget(self, key: str) -> None:
        self._unheard.discard(key)
        self._ids.pop(key, None)
        self._cursors.pop(key, None)
        self._digests.pop(key, None)


def check_position(request_id: str, start: int, state: bytes | None, offset: bytes | None) -> None:
    """Whether a request with this `state` and `offset` has anything to say after `start` tokens.

    Raises:
        NotFound: there is no such request.
        InvalidRequest: it ended before `start`.
    """
    if state is None:
        text = f"no request {request_id} in this queue: a wrong id, or its result expired"
        raise NotFound(text, request_id)
    total = int(offset or 0)
    if state == b"end" and start > total:
        raise InvalidRequest("start", f"at most {total}, where the request ended", start)


def _delta(request_id: str, entry_id: str, fields: dict[bytes, bytes]) -> Delta:
    token_ids = unpack_token_ids(fields[b"t"])
    finish_reason = fields.get(b"f", b"").decode()
    usage = None
    if finish_reason:
        usage = Usage(prompt_tokens=int(fields[b"p"]), completion_tokens=int(fields[b"c"]))
    logprobs, of_prompt = unpack_logprobs(fields.get(b"l", b""))
    return Delta(
        request_id=request_id,
        start=int(entry_id.partition("-")[0]) - len(token_ids),
        token_ids=token_ids,
        text=fields[b"x"].decode(),
        finish_reason=finish_reason,
        reason=fields.get(b"y", b"").decode(),
        usage=usage,
        digest=fields[b"h"].decode(),
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
    )
