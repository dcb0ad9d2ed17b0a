"""What a run tells while it goes: a bar on a terminal, else plain lines, or JSON lines."""

import json
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import click

from tokenmill.producer.journal import Answer

#: Seconds between two plain lines of progress.
LINE_EVERY_S = 5.0
_TITLE_CHARS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    rows: int
    answered: int
    failed: int
    #: Tokens generated and seconds taken this time.
    tokens: int
    seconds: float
    output: str
    #: False when it stopped before all rows had ended.
    complete: bool = True
    #: The output was there already; nothing was done.
    already: bool = False


class Report:
    """Who is told about a run; by default it does nothing with it."""

    #: Whether `text` is to be called while answers are being written.
    wants_text = False

    def note(self, text: str) -> None:
        """Something the user should know."""

    def begin(self, rows: int, done: int, failed: int) -> None:
        """The run starts, `done` of its rows ended in an earlier one."""

    def opened(self, row: int, title: str) -> None:
        """A row was sent."""

    def text(self, row: int, text: str, tokens: int) -> None:
        """More of a row's answer came."""

    def ended(self, answer: Answer) -> None:
        """A row has ended, well or badly."""

    def tick(self) -> None:
        """Time has passed."""

    def finish(self, outcome: Outcome) -> None:
        """The run is over."""


class Live:
    """Prints answers in the order the rows were sent: the first open one as it comes."""

    def __init__(self) -> None:
        self._titles: dict[int, str] = {}
        self._waiting: deque[int] = deque()
        self._texts: dict[int, list[str]] = {}
        self._ended: dict[int, Answer] = {}
        self.rows = 0

    def opened(self, row: int, title: str) -> None:
        """A row takes its turn in the order of these calls."""
        self._titles[row] = " ".join(title.split())
        self._waiting.append(row)
        self._texts[row] = []
        if self._waiting[0] == row:
            self._print_title(row)

    def text(self, row: int, text: str) -> None:
        """Print it when the row is in front, else keep it."""
        if self._waiting and self._waiting[0] == row:
            click.echo(text, nl=False)
        else:
            self._texts[row].append(text)

    def ended(self, answer: Answer) -> None:
        """Let the next rows have their turn once the one in front has ended."""
        if answer.row not in self._texts:
            return
        self._ended[answer.row] = answer
        while self._waiting and self._waiting[0] in self._ended:
            row = self._waiting.popleft()
            ended = self._ended.pop(row)
            del self._texts[row]
            click.echo("" if ended.ok else f"[{ended.finish_reason}: {ended.reason}]")
            click.echo("")
            if self._waiting:
                self._print_title(self._waiting[0])
                click.echo("".join(self._texts[self._waiting[0]]), nl=False)
                self._texts[self._waiting[0]].clear()

    def _print_title(self, row: int) -> None:
        title = self._titles.pop(row)
        title = title if len(title) <= _TITLE_CHARS else f"{title[: _TITLE_CHARS - 3]}..."
        click.secho(f"[{row + 1}/{self.rows}] {title}", bold=True)


class HumanReport(Report):
    """For people: messages on standard error, live text on standard output."""

    def __init__(self, *, live: bool = False, bar: bool | None = None) -> None:
        """`bar` draws a progress bar; by default where standard error is a terminal."""
        self._live = Live() if live else None
        self.wants_text = live
        is_terminal = sys.stderr.isatty()
        self._wants_bar = not live and (is_terminal if bar is None else bar)
        self._bar: Any = None
        self._rows = self._done = self._failed = self._tokens = 0
        self._started_with = 0
        self._since = self._next_line = time.monotonic()

    def note(self, text: str) -> None:
        self._say(text)

    def begin(self, rows: int, done: int, failed: int) -> None:
        self._rows, self._done, self._started_with, self._failed = rows, done, done, failed
        self._since = time.monotonic()
        self._next_line = self._since + LINE_EVERY_S
        if done:
            self._say(f"going on: {done} of {rows} rows are done")
        if self._live:
            self._live.rows = rows
        if self._wants_bar and rows > done:
            self._bar = click.progressbar(
                length=rows - done,
                label="rows",
                show_pos=True,
                file=sys.stderr,
                item_show_func=lambda _item: self._rate(),
            )
            self._bar.render_progress()

    def opened(self, row: int, title: str) -> None:
        if self._live:
            self._live.opened(row, title)

    def text(self, row: int, text: str, tokens: int) -> None:
        self._tokens += tokens
        if self._live:
            self._live.text(row, text)

    def ended(self, answer: Answer) -> None:
        self._done += 1
        if not answer.ok:
            self._failed += 1
            self._say(f"line {answer.line}: {answer.reason or answer.finish_reason}")
        if self._live:
            self._live.ended(answer)
        if self._bar:
            self._bar.update(1)

    def tick(self) -> None:
        now = time.monotonic()
        if self._bar:
            self._bar.render_progress()
        elif not self._live and now >= self._next_line:
            self._next_line = now + LINE_EVERY_S
            self._say(f"{self._done}/{self._rows} rows, {self._rate()}, {self._time_left(now)}")

    def finish(self, outcome: Outcome) -> None:
        if self._bar:
            self._bar.render_finish()
            self._bar = None
        failed = f", {outcome.failed} failed" if outcome.failed else ""
        if outcome.already:
            self._say(
                f"{outcome.output} is complete already ({outcome.rows} rows{failed}); "
                "--overwrite generates it anew"
            )
            return
        rate = outcome.tokens / outcome.seconds if outcome.seconds else 0.0
        state = "" if outcome.complete else f" of {outcome.rows}, stopped"
        self._say(
            f"{outcome.answered} rows answered{state}{failed}; {outcome.tokens:,} tokens in "
            f"{outcome.seconds:.1f} s ({rate:.0f} tokens/s): {outcome.output}"
        )

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._since, 1e-3)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._tokens / seconds:.0f} tokens/s{failed}"

    def _time_left(self, now: float) -> str:
        done = self._done - self._started_with
        if not done:
            return "time left not known yet"
        seconds = (self._rows - self._done) * (now - self._since) / done
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left"

    def _say(self, text: str) -> None:
        if self._bar:
            click.echo("\r\033[K", nl=False, err=True)
        click.echo(text, err=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:  # interrupted: leave the terminal as it was
            self._bar.render_finish()
            self._bar = None
        if self._live and error is not None:
            click.echo("")


class JsonReport(Report):
    """For programs: one JSON object a line on standard output."""

    def __init__(self, *, live: bool = False) -> None:
        self._live = self.wants_text = live
        self._rows = self._done = self._failed = self._tokens = 0
        self._since = time.monotonic()
        self._next = 0.0

    def note(self, text: str) -> None:
        self._event("note", text=text)

    def begin(self, rows: int, done: int, failed: int) -> None:
        self._rows, self._done, self._failed = rows, done, failed
        self._since = time.monotonic()
        self._event("begin", rows=rows, done=done, failed=failed)

    def text(self, row: int, text: str, tokens: int) -> None:
        self._tokens += tokens
        if self._live:
            self._event("text", row=row, text=text)

    def ended(self, answer: Answer) -> None:
        self._done += 1
        self._failed += not answer.ok
        fields = {name: value for name, value in asdict(answer).items() if name != "text"}
        self._event("row" if answer.ok else "row_failed", **fields)

    def tick(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_EVERY_S
            rate = self._tokens / max(now - self._since, 1e-3)
            self._event(
                "progress",
                rows=self._rows,
                done=self._done,
                failed=self._failed,
                tokens=self._tokens,
                tokens_per_s=round(rate, 1),
            )

    def finish(self, outcome: Outcome) -> None:
        self._event("end", **asdict(outcome))

    def _event(self, event: str, **fields: Any) -> None:
        click.echo(json.dumps({"event": event} | fields))
