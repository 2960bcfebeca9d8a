"""The log of a run: a progress bar (plain lines without a terminal), ``run.log``, metrics for the trackers."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch

from mmdistill.console import ProgressDisplay
from mmdistill.errors import format_count
from mmdistill.files import write_errors
from mmdistill.training.loggers import TRACKERS, Csv, ResumePoint, Tracker

LOG_FILE = "run.log"


class RunLog:
    """Log of one run in its folder, with a progress bar up to `total_steps`.

    On other ranks than 0 (`enabled=False`) every method does nothing.
    """

    def __init__(self, run_dir: Path, *, total_steps: int, title: str, enabled: bool = True) -> None:
        self.enabled = enabled
        self._trackers: list[Tracker] = []
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = run_dir / LOG_FILE
            self._display = ProgressDisplay(title, total_steps, show_ends=True, print_line=self.info)

    def __enter__(self) -> "RunLog":
        if self.enabled:
            self._display.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self._display.__exit__(kind, error, tb)
            for tracker in self._trackers:
                with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # `error` is the cause
                    tracker.close()

    def open_trackers(self, names: Sequence[str], config: Mapping[str, Any], resume: ResumePoint | None = None) -> None:
        """Start to send metrics to these `TRACKERS`. `config` is the resolved config as builtin containers."""
        if not self.enabled:
            return
        self._trackers = [TRACKERS[name](self._file.parent, config, resume) for name in names]
        for table in (tracker.logger for tracker in self._trackers if isinstance(tracker.logger, Csv)):
            if resume and table.num_copied:
                self.info(f"copied {format_count(table.num_copied, 'row')} of metrics.csv from {resume.run_dir}")

    def step(self, done: int, note: str) -> None:
        """Update the progress bar: `done` steps are finished. `note` and the peak memory are shown next to it."""
        if self.enabled:
            self._display.update(done, f"{note} {peak_memory()}")

    def info(self, text: str) -> None:
        """Print a line above the bar, on standard error, and append it to ``run.log``. An empty text is ignored."""
        if self.enabled and text:
            self._display.print(text)
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
            with (
                write_errors(self._file, len(line)),
                self._file.open("a", encoding="utf-8", errors="backslashreplace") as file,
            ):
                file.write(line)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send metrics after `step` optimizer steps to each tracker."""
        for tracker in self._trackers:
            tracker.log_metrics(step, values)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Send an image, uint8 (height, width, 3), to each tracker."""
        for tracker in self._trackers:
            tracker.log_image(step, name, image)


class ThroughputMeter:
    """Clips per second of all ranks, and the percentage of the time that this rank waits for data, since `restart`.

    `num_steps` is the number of `add_clips` since then.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start to measure, and to wait for the first batch."""
        self._start = self._wait_start = time.monotonic()
        self.num_steps, self._num_clips, self._wait_s = 0, 0, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not part of the training, such as that of a validation."""
        start = time.monotonic()
        yield
        elapsed_s = time.monotonic() - start
        self._start, self._wait_start = self._start + elapsed_s, self._wait_start + elapsed_s

    def end_wait(self) -> None:
        """The loader has returned a batch."""
        self._wait_s += time.monotonic() - self._wait_start

    def add_clips(self, num_clips: int) -> None:
        """A step with `num_clips` over all ranks is done; the wait for the next batch starts."""
        self.num_steps += 1
        self._num_clips += num_clips
        self._wait_start = time.monotonic()

    @property
    def metrics(self) -> dict[str, float]:
        """``clips_per_s`` and ``data_wait_percent``."""
        elapsed_s = max(time.monotonic() - self._start, 1e-9)
        return {"clips_per_s": self._num_clips / elapsed_s, "data_wait_percent": 100 * self._wait_s / elapsed_s}


def baseline_ratio(loss: float, constant_baseline: float) -> float:
    """`loss` divided by that of the constant baseline; NaN if the baseline is 0 (constant targets)."""
    return loss / constant_baseline if constant_baseline else math.nan


def peak_memory() -> str:
    """The peak memory of this process, with its name: of the GPU if it uses one, else of the host."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"peak memory {_peak_host_memory() / 2**30:.1f} GiB"


def _peak_host_memory() -> int:
    """Bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
