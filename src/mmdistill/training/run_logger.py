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

from mmdistill.console import ProgressDisplay
from mmdistill.training.loggers import Csv, Tracker, carry_rows, open_trackers

LOG_FILE = "run.log"
DEFAULT_TRACKERS = ("tensorboard", "csv")


class RunLog:
    """Log of one run. On other ranks than 0 (`enabled=False`) every call does nothing.

    Args:
        run_dir: the run's folder.
        total_steps: of the whole run.
        title: of the bar.
        enabled: on rank 0 only.
        trackers: names, see `mmdistill.training.loggers`.
        config: the resolved config, for trackers that show it.
        source: the checkpoint that the run goes on from.
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
        source: Path | None = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = run_dir / LOG_FILE
        self._trackers: list[Tracker] = open_trackers(trackers, run_dir, config or {}, source)
        self._display = ProgressDisplay(title, total_steps, show_ends=True, print_line=self.say)

    def __enter__(self) -> "RunLog":
        if self.enabled:
            self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self._display.__exit__(kind, error, tb)
            for tracker in self._trackers:
                tracker.close()

    def continues(self, checkpoint: Path, step: int) -> None:
        """The run goes on from a `checkpoint` of `step`: in a folder of its own, its table begins with that run's."""
        if self.enabled and any(isinstance(tracker, Csv) for tracker in self._trackers):
            rows = carry_rows(checkpoint, self._file.parent, step)
            if rows:
                self.say(f"metrics.csv begins with {rows} rows of {checkpoint.absolute().parents[1]}")

    def step(self, done: int, note: str) -> None:
        """Show that `done` steps are finished, and the memory."""
        if self.enabled:
            self._display.update(done, f"{note} {memory()}")

    def say(self, text: str) -> None:
        """One line above the bar, on standard error, and in ``run.log``."""
        if self.enabled:
            self._display.print(text)
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
