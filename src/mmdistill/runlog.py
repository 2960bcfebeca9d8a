"""What a run tells: a progress bar (plain lines without a terminal), ``run.log``, and numbers to the trackers."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmdistill.trackers import Tracker, open_trackers

PLAIN_LINE_SECONDS = 15.0
LOG_FILE = "run.log"
DEFAULT_TRACKERS = ("tensorboard", "csv")


class RunLog:
    """Log of one run. On other ranks than 0 (`enabled=False`) every call does nothing.

    Args:
        run_dir: the run's folder.
        total_steps: of the whole run.
        title: of the bar.
        enabled: on rank 0 only.
        trackers: names, see `mmdistill.trackers`.
        config: the resolved config, for trackers that show it.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        title: str,
        enabled: bool = True,
        trackers: Sequence[str] = DEFAULT_TRACKERS,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = run_dir / LOG_FILE
        self._trackers: list[Tracker] = open_trackers(trackers, run_dir, config or {})
        self._title = title
        self._total = total_steps
        self._console = Console(file=sys.stderr)
        self._last_line = 0.0
        self._first: tuple[float, int] | None = None  # time and step of the first call of `step`
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
            for tracker in self._trackers:
                tracker.close()

    def step(self, done: int, note: str) -> None:
        """Show that `done` steps are finished; a plain line, now and then, has the time left and the memory too."""
        if not self.enabled:
            return
        note = f"{note} {memory()}"
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        self._first = self._first or (now, done)
        if not self._console.is_terminal and (now - self._last_line > PLAIN_LINE_SECONDS or done == self._total):
            self._last_line = now
            self.say(f"{self._title} {done}/{self._total} {note} {self._left(now, done)}")

    def _left(self, now: float, done: int) -> str:
        assert self._first is not None
        began, first = self._first
        if done == first:
            return "ETA ?"
        seconds = round((now - began) / (done - first) * (self._total - done))
        return f"ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def say(self, text: str) -> None:
        """One line above the bar, on standard error, and in ``run.log``."""
        if self.enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after `step` optimiser steps, to each tracker."""
        if self.enabled:
            for tracker in self._trackers:
                tracker.scalars(step, values)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 (height, width, 3), to each tracker that shows pictures."""
        if self.enabled:
            for tracker in self._trackers:
                tracker.picture(step, name, image)


def memory() -> str:
    """The largest memory that this process has had: of the GPU where it uses one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
