"""What a run tells: a progress bar (plain lines without a terminal), metrics.csv and TensorBoard."""

import csv
import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

PLAIN_LINE_SECONDS = 15.0


class RunLog:
    """Log of one run. On other ranks than 0 (`enabled=False`) every call does nothing."""

    def __init__(self, run_dir: Path, *, total_steps: int, title: str, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._csv_path = run_dir / "metrics.csv"
        self._board = SummaryWriter(str(run_dir / "tensorboard"))
        self._title = title
        self._total = total_steps
        self._console = Console(file=sys.stderr)
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total_steps, note="")

    def __enter__(self) -> "RunLog":
        if self.enabled:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self._bar.stop()
            self._board.close()

    def step(self, done: int, note: str) -> None:
        """Show that `done` steps are finished."""
        if not self.enabled:
            return
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line > PLAIN_LINE_SECONDS or done == self._total):
            self._last_line = now
            self.say(f"{self._title} {done}/{self._total} {note}")

    def say(self, text: str) -> None:
        """One line above the bar, on standard error."""
        if self.enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A row of metrics.csv and a point of each curve. The first call fixes the columns of a new file."""
        if not self.enabled:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        row = {"step": step, **values}
        new = not self._csv_path.exists()
        with self._csv_path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
