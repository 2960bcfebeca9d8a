"""The log of a run: a progress bar (plain lines without a terminal), ``run.log``, and metrics for the trackers."""

import math
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
from mmdistill.errors import format_count
from mmdistill.training.loggers import Csv, ResumePoint, Tracker, copy_metrics_history, open_trackers

LOG_FILE = "run.log"
DEFAULT_TRACKERS = ("tensorboard", "csv")


class RunLog:
    """Log of one run. On other ranks than 0 (`enabled=False`) every method does nothing.

    Args:
        run_dir: the run's folder.
        total_steps: optimizer steps or batches of the whole run, as passed to `step`.
        title: title of the progress bar.
        enabled: True on rank 0 only.
        trackers: names, see `mmdistill.training.loggers`.
        config: the resolved config, for the trackers.
        resume: the checkpoint that the run resumes from. A run in a new folder copies the metrics up to its step.
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
        resume: ResumePoint | None = None,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = run_dir / LOG_FILE
        self._trackers: list[Tracker] = open_trackers(trackers, run_dir, config or {}, resume)
        self._display = ProgressDisplay(title, total_steps, show_ends=True, print_line=self.info)
        if resume:
            self.inherit_metrics(resume)

    def __enter__(self) -> "RunLog":
        if self.enabled:
            self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self._display.__exit__(kind, error, tb)
            for tracker in self._trackers:
                tracker.close()

    def inherit_metrics(self, resume: ResumePoint) -> None:
        """Copy the rows of ``metrics.csv`` from the resumed run, if it is in another folder."""
        if any(isinstance(tracker, Csv) for tracker in self._trackers):
            num_rows = copy_metrics_history(resume, self._file.parent)
            if num_rows:
                self.info(f"copied {format_count(num_rows, 'row')} of metrics.csv from {resume.run_dir}")

    def step(self, done: int, note: str) -> None:
        """Update the progress bar: `done` steps are finished. `note` and the peak memory are shown next to it."""
        if self.enabled:
            self._display.update(done, f"{note} {peak_memory()}")

    def info(self, text: str) -> None:
        """Print a line above the bar, on standard error, and append it to ``run.log``. An empty text is ignored."""
        if self.enabled and text:
            self._display.print(text)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send metrics after `step` optimizer steps to each tracker."""
        if self.enabled:
            for tracker in self._trackers:
                tracker.log_metrics(step, values)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Send an image, uint8 (height, width, 3), to each tracker."""
        if self.enabled:
            for tracker in self._trackers:
                tracker.log_image(step, name, image)


def baseline_ratio(loss: float, constant_baseline: float) -> float:
    """`loss` divided by that of the constant baseline; NaN if the baseline is 0 (constant targets)."""
    return loss / constant_baseline if constant_baseline else math.nan


def peak_memory() -> str:
    """The peak memory of this process, with its name: of the GPU if it uses one, else of the host."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
