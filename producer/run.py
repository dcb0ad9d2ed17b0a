"""`Run`: one attempt at a dataset run: rows go out in a window, answers into the journal.

Longer than other files: what a lost server, worker or answer means for a row is decided here alone.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from tokenmill.producer.client import Client
from tokenmill.producer.dataset import BadRow, Dataset, Row
from tokenmill.producer.embedded import ensure_server
from tokenmill.producer.errors import (
    Busy,
    InvalidRequest,
    NotFound,
    OutputChanged,
    ServerUnreachable,
    TokenmillError,
)
from tokenmill.producer.follower import Follower
from tokenmill.producer.journal import Answer, Journal, OutputError
from tokenmill.producer.output import json_line, write_lines
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import Outcome, Report
from tokenmill.producer.replies import Replies
from tokenmill.producer.sent_row import SentRow, request_id, row_of, title
from tokenmill.producer.serving import Serving
from tokenmill.producer.wire import Delta, Request

#: Long enough for a run that is taken up again days later.
DEADLINE_S = 7 * 86_400
#: Prompts in flight take at most about so much memory, whatever the window.
MAX_OPEN_TOKENS = 16 * 2**20
_POLL_S = 0.5
_WATCH_S = 1.0
#: Runs of more rows, which nobody watches, take each answer whole: far less work for the server.
BULK_ROWS = 1000
#: After so long without a token the user is told of whoever is served meanwhile.
_QUIET_S = 3.0
#: Kept by the server after the row is in the journal: for whoever follows it right then.
_KEEP_S = 600.0


class Run:
    """One attempt at a run."""

    def __init__(
        self,
        plan: Plan,
        dataset: Dataset,
        journal: Journal,
        client: Client,
        report: Report,
        *,
        embedded: bool,
    ) -> None:
        self._plan = plan
        self._dataset = dataset
        self._journal = journal
        self._client = client
        self._report = report
        self._serving = Serving(plan, client, embedded=embedded)
        self._reader: Follower | Replies = client.follower()
        #: Answers to rows that an earlier attempt sent, and this one has not come to.
        self._early: dict[str, Delta] = {}
        self._open: dict[str, SentRow] = {}
        self._unsent: list[SentRow] = []
        self._open_tokens = 0
        self._tokens = 0
        self._send_at = self._watch_at = 0.0
        self._moved_at = time.monotonic()
        #: Requests whose answers are in the journal, for the server to forget.
        self._kept: list[str] = []
        #: What the user was told to be waiting for, "" for nothing.
        self._waiting_for = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._serving.stop()

    def prepare(self, check_model: Callable[[str], None]) -> None:
        """Settle the model and begin the journal; nothing was sent before.

        Raises:
            TokenmillError: no worker can serve the model.
        """
        begun, named = self._journal.header.model, self._dataset.survey.model
        is_served = self._serving.settle(begun, named, check_model)
        for name in ("quantization", "kv_cache_dtype", "lora") if is_served else ():
            # Whoever started it has chosen how it computes.
            if chosen := getattr(self._plan, name):
                shown = chosen if isinstance(chosen, str) else " ".join(chosen)
                self._report.note(
                    f"a worker serves {self._serving.model} already: it computes as it was "
                    f"started, whatever --{name.replace('_', '-')} {shown} says"
                )
        for row in self._journal.superseded(self._plan.window):
            self._cancel(request_id(self._journal.superseded_run, row, self._client.num_shards))
        is_bulk = self._dataset.survey.rows > BULK_ROWS and not self._report.wants_text
        run = self._journal.header.run
        self._journal.start(self._serving.model, reply_to=run if is_bulk else "")
        if self._journal.header.reply_to:
            self._reader = self._client.replies(self._journal.header.reply_to)

    def go(self, stop_at: float | None) -> Outcome:
        """Send, read and keep until every row has ended, then write the output."""
        started = time.monotonic()
        rows = self._dataset.survey.rows
        done = self._journal.answered + self._journal.failed
        self._report.begin(rows, done, self._journal.failed)
        left = (row for row in self._dataset if not self._journal.has(row.index))
        is_complete = True
        self._watch()  # loading a model takes longer than all before it: begin with that
        while self._fill(left):
            if stop_at is not None and time.monotonic() >= stop_at:
                is_complete = False
                break
            self._watch()
            self._read()
            self._report.tick()
        self._forget()
        if is_complete:
            write_lines(Path(self._plan.output), self._output_lines())
            self._journal.remove()
        outcome = Outcome(
            rows=rows,
            answered=self._journal.answered,
            failed=self._journal.failed,
            tokens=self._tokens,
            seconds=time.monotonic() - started,
            output=self._plan.output,
            complete=is_complete,
        )
        self._report.finish(outcome)
        return outcome

    def _fill(self, left: Iterator[Row | BadRow]) -> bool:
        """Send rows until the window is full; False when every row has ended."""
        is_more = True
        while is_more:
            is_more = self._take_rows(left)
            self._send()
            if self._open or self._unsent:
                return True
        return False  # nothing is left: what came early has emptied the window

    def _take_rows(self, left: Iterator[Row | BadRow]) -> bool:
        """Prepare rows for the room in the window; False when there are no more."""
        while (
            len(self._open) + len(self._unsent) < self._plan.window
            and self._open_tokens < MAX_OPEN_TOKENS
        ):
            row = next(left, None)
            if row is None:
                return False
            item = self._prepared(row)
            if isinstance(item, BadRow):
                self._refuse(item)
            else:
                self._unsent.append(item)
                self._open_tokens += item.request.prompt_cost
        return True

    def _prepared(self, row: Row | BadRow) -> SentRow | BadRow:
        if isinstance(row, BadRow):
            return row
        run = self._journal.header.run
        try:
            self._serving.check(row)
            request = Request.from_mapping(
                {
                    "request_id": request_id(run, row.index, self._client.num_shards),
                    "prompt": row.prompt,
                    "params": row.params,
                    "tools": row.tools,
                    "model": self._serving.model_of(row),
                    # A lane of its own: runs share the workers, rather than wait for each other.
                    "tenant": run,
                    "priority": self._plan.priority,
                    "reply_to": self._journal.header.reply_to,
                    "deadline_ms": int((time.time() + DEADLINE_S) * 1000),
                }
            )
            request.pack()  # its size is checked here, where it fails this row alone
        except InvalidRequest as error:
            return row.refused(error)
        return SentRow(row=row, request=request)

    def _refuse(self, row: BadRow) -> None:
        answer = Answer(
            row=row.index,
            line=row.line,
            finish_reason="error",
            reason=row.message,
            field=row.field,
            ended_s=int(time.time()),
        )
        self._journal.add(answer)
        self._report.ended(answer)

    def _send(self) -> None:
        if not self._unsent or time.monotonic() < self._send_at:
            return
        try:
            self._client.submit_many(item.request for item in self._unsent)
        except Busy as error:
            self._wait_for(f"room in the queue: {error}")
            self._send_at = time.monotonic() + error.retry_after_s
            return
        except ServerUnreachable as error:
            self._lost(error)
            self._send_at = time.monotonic() + _WATCH_S
            return
        for item in self._unsent:
            self._open[item.request.request_id] = item
            self._reader.add(item.request.request_id)
            self._report.opened(item.row.index, title(item.row.prompt))
        sent = [item.request.request_id for item in self._unsent]
        self._unsent.clear()
        for name in sent:
            if name in self._early:
                self._reader.remove(name)
                self._take(self._early.pop(name))

    def _read(self) -> None:
        if not self._open:
            time.sleep(0.1)  # nothing could be sent yet
            return
        try:
            polled = self._reader.poll(_POLL_S)
            deltas = [item if isinstance(item, Delta) else item.as_delta() for item in polled]
        except NotFound as error:
            # The server has lost what it had: send everything again, and read this from its start.
            self._resend()
            item = self._open[error.request_id]
            if item.parts:
                self._reread(item)
            else:
                self._reader.add(error.request_id)
            return
        except OutputChanged as error:
            self._reread(self._open[error.request_id])
            return
        if deltas:
            self._moved_at = time.monotonic()
            if self._waiting_for == "turn":
                self._waiting_for = ""
        for delta in deltas:
            self._take(delta)

    def _take(self, delta: Delta) -> None:
        item = self._open.get(delta.request_id)
        if item is None:
            if self._journal.has(row_of(delta.request_id)):
                self._kept.append(delta.request_id)
            else:
                self._early[delta.request_id] = delta
            return
        item.tokens = delta.end
        item.parts.append(delta.text)
        self._tokens += len(delta.token_ids)
        hidden = min(item.shown, len(delta.text))
        item.shown -= hidden
        self._report.text(item.row.index, delta.text[hidden:], len(delta.token_ids))
        if delta.finish_reason:
            self._end(item, delta)

    def _end(self, item: SentRow, delta: Delta) -> None:
        answer = Answer(
            row=item.row.index,
            line=item.row.line,
            text="".join(item.parts),
            finish_reason=delta.finish_reason,
            reason=delta.reason,
            prompt_tokens=delta.usage.prompt_tokens if delta.usage else 0,
            completion_tokens=delta.usage.completion_tokens if delta.usage else item.tokens,
            ended_s=int(time.time()),
        )
        self._journal.add(answer)
        del self._open[delta.request_id]
        self._kept.append(delta.request_id)
        self._open_tokens -= item.request.prompt_cost
        self._report.ended(answer)

    def _reread(self, item: SentRow) -> None:
        self._report.note(
            f"line {item.row.line}: the server has lost part of the answer; reading it anew"
        )
        item.shown += sum(len(part) for part in item.parts)
        item.parts.clear()
        item.tokens = 0
        self._reader.add(item.request.request_id)

    def _resend(self) -> None:
        """After a server was away: send again what it may have lost, a no-op for what it has."""
        try:
            self._client.submit_many(item.request for item in self._open.values())
        except (Busy, ServerUnreachable) as error:
            self._lost(error)

    def _watch(self) -> None:
        """Now and then: does the server answer, does a worker live?"""
        if time.monotonic() < self._watch_at:
            return
        self._watch_at = time.monotonic() + _WATCH_S
        was_lost = self._waiting_for == "server"
        try:
            is_served = self._serving.is_live()
        except ServerUnreachable as error:
            self._lost(error)
            return
        if was_lost:
            self._report.note("the server is back; going on")
            self._waiting_for = ""
            self._resend()
        self._forget()
        if not is_served and not self._serving.has_brought:
            self._need_worker()
        elif is_served and self._waiting_for == "worker":
            self._waiting_for = ""
            self._report.note("a worker is live; going on")
        elif is_served:
            self._tell_of_others()

    def _tell_of_others(self) -> None:
        """When nothing moves for a while: for how many others the workers may be busy."""
        is_told = self._waiting_for not in ("", "room")
        if is_told or time.monotonic() - self._moved_at < _QUIET_S:
            return
        try:
            others = self._client.live() - len(self._open)
        except ServerUnreachable:
            return  # the next look at the workers tells
        if others > 0:
            what = "request is" if others == 1 else "requests are"
            self._wait_for(f"its turn: {others} other {what} live on {self._plan.queue}", "turn")

    def _forget(self) -> None:
        """Let the server drop what the journal has for good: a large run must not fill it."""
        if not self._kept:
            return
        self._journal.sync()
        try:
            self._client.forget(self._kept, within_s=_KEEP_S)
        except (Busy, ServerUnreachable):
            return  # tried again at the next look; in the end its own time to live drops it
        self._kept.clear()

    def _need_worker(self) -> None:
        if self._serving.embedded:
            self._serving.bring()
            self._report.note(f"starting a worker for {self._serving.model}")
        else:
            self._wait_for(self._serving.missing(), "worker")

    def _lost(self, error: TokenmillError) -> None:
        self._wait_for(f"the server: {error}; retrying", "server")
        if self._serving.embedded:
            try:
                ensure_server()
            except ServerUnreachable as again:
                self._report.note(str(again))

    def _wait_for(self, text: str, what: str = "room") -> None:
        if self._waiting_for != what:
            self._waiting_for = what
            self._report.note(f"waiting for {text}")

    def _cancel(self, stale: str) -> None:
        try:
            self._client.cancel(stale)
        except NotFound:
            return

    def _output_lines(self) -> Iterator[bytes]:
        header = self._journal.header
        for row in self._dataset:
            answer = self._journal.answer(row.index)
            if answer is None or answer.line != row.line:
                raise OutputError(f"{self._plan.input} has changed during the run; start anew")
            model = self._serving.model_of(row) if isinstance(row, Row) else header.model
            values = self._dataset.output_row(row, answer, run=header.run, model=model)
            yield json_line(values)
