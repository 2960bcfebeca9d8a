"""A progress bar on a terminal, a line every 15 seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_LINE_SECONDS = 15.0


@contextmanager
def progress(title: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`, to be called when n more of `total` are done. Writes to standard error."""
    console = Console(file=sys.stderr)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
    )
    task = bar.add_task(title, total=total)
    state = {"done": 0.0, "last": time.monotonic()}

    def advance(n: int) -> None:
        bar.advance(task, n)
        state["done"] += n
        if enabled and not console.is_terminal and time.monotonic() - state["last"] > _PLAIN_LINE_SECONDS:
            state["last"] = time.monotonic()
            console.print(f"{title} {state['done']:.0f}/{total}", highlight=False, markup=False, soft_wrap=True)

    with bar:
        yield advance
