"""The display of everything that takes a while: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 15.0


class Display:
    """Progress of one task, on standard error.

    Args:
        title: of the task.
        total: its steps.
        enabled: False shows nothing.
        ends: a plain line at the first and the last step too.
        say: prints a plain line; None: the display itself does.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        enabled: bool = True,
        ends: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.title, self.total, self.enabled, self.ends = title, total, enabled, ends
        self._console = Console(file=sys.stderr)
        self._say = say or self.say
        self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and step of the first update
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are finished. Without a terminal a line at most every 15 seconds."""
        if not self.enabled:
            return
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        end = self.ends and (self._first is None or done == self.total)
        self._first = self._first or (now, done)
        due = end or now - self._last_line > PLAIN_LINE_SECONDS
        if due and not self._console.is_terminal:
            self._last_line = now
            self._say(" ".join(filter(None, (f"{self.title} {done}/{self.total}", note, self._left(now, done)))))

    def _left(self, now: float, done: int) -> str:
        assert self._first is not None
        began, first = self._first
        if done == first:
            return "ETA ?"
        seconds = round((now - began) / (done - first) * (self.total - done))
        return f"ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def say(self, text: str) -> None:
        """One line above the bar."""
        if self.enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int, *, enabled: bool = True, ends: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`, to be called when n more of `total` are done."""
    done = 0
    with Display(title, total, enabled=enabled, ends=ends) as display:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            display.update(done)

        yield advance
