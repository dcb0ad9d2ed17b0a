"""`Told`: a report that remembers what it was told."""

from collections.abc import Callable

from tokenmill.producer.journal import Answer
from tokenmill.producer.progress import Report


class Told(Report):
    """What a run said, in order; `on_begin` and `on_end` may act in its middle."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.answers: list[Answer] = []
        self.began: tuple[int, int, int] = (0, 0, 0)
        self.texts: dict[int, str] = {}
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[Answer], None] = lambda _answer: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, rows: int, done: int, failed: int) -> None:
        self.began = (rows, done, failed)
        self.on_begin()

    def text(self, row: int, text: str, tokens: int) -> None:
        self.texts[row] = self.texts.get(row, "") + text

    def ended(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.on_end(answer)
