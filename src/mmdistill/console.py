"""Messages on standard error. Progress of long tasks: a bar on a terminal, a line from time to time elsewhere."""

import atexit
import hashlib
import io
import logging
import os
import select
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_S = 15.0
COMMAND_ID = "MMDISTILL_COMMAND_ID"  # environment variable: the same in all processes of a command, which inherit it
log = logging.getLogger(__name__)
_logged: set[str] = set()  # by this process


def log_once(message: str, key: str | None = None) -> None:
    """Log a warning, unless a process of this command has logged one with the same `key` (default: the text).

    The process that can create an empty file in the folder for temporary files logs. The first process of the command
    removes these files when it exits. Without such a folder, each process logs once. Only rank 0 and its workers log,
    because ranks that another program starts have no common first process.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    name = f"{os.environ[COMMAND_ID]}-{hashlib.sha256((key or message).encode()).hexdigest()}"
    if name in _logged:
        return
    _logged.add(name)
    try:
        Path(tempfile.gettempdir(), name).touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:
        pass
    log.warning(message)


def _remove_temporary_files() -> None:
    """Remove the files of `log_once` of this command, and those of commands that were killed."""
    with suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob("mmdistill-log-*"):
            pid = path.name.split("-")[2]
            if path.name.startswith(f"{os.environ[COMMAND_ID]}-") or not psutil.pid_exists(int(pid)):
                path.unlink(missing_ok=True)


if COMMAND_ID not in os.environ:
    os.environ[COMMAND_ID] = f"mmdistill-log-{os.getpid()}-{uuid.uuid4().hex}"
    atexit.register(_remove_temporary_files)


@contextmanager
def record_warnings() -> Iterator[Callable[[], list[str]]]:
    """Yield a function that returns the distinct warnings that mmdistill has logged since the start of the block.

    Warnings of forked worker processes are included. The warnings of `log_once` are logged again in the block.
    """
    command_id = os.environ[COMMAND_ID]
    os.environ[COMMAND_ID] = f"{command_id}-{uuid.uuid4().hex}"
    logger = logging.getLogger(__name__.partition(".")[0])
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:  # without a name, so none remains after SIGKILL
        handlers: list[logging.Handler] = [logging.StreamHandler(file)]  # forked processes share its position
        handlers[0].setLevel(logging.WARNING)
        if not logger.hasHandlers() and logging.lastResort:  # which logs only without any other handler
            handlers.append(logging.lastResort)
        for added in handlers:
            logger.addHandler(added)
        try:
            yield lambda: list(dict.fromkeys(_read_all(file).splitlines()))
        finally:
            for added in handlers:
                logger.removeHandler(added)
            os.environ[COMMAND_ID] = command_id


def _read_all(file: TextIO) -> str:
    """The content of a file; the position of the file, at which processes write, stays at its end."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
    file.seek(0)  # Windows, which has no forks
    return file.read()


def program_name() -> str:
    """Start of a message: ``mmdistill VERB``, or ``mmdistill`` if a script calls the verb."""
    return sys.argv[0] if sys.argv[0].startswith("mmdistill ") else "mmdistill"


@contextmanager
def exit_if_pipe_closed() -> Iterator[None]:
    """Exit with status 1, without a traceback, if the reader of standard output has ended, for example `head`.

    Letters that the terminal cannot show, and bytes of file names that are no text, are printed as escapes.

    Raises:
        SystemExit: standard output is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if hasattr(select, "poll"):  # Windows has none
            pipe = select.poll()
            pipe.register(sys.stdout.fileno(), 0)  # reports errors only
            if not pipe.poll(0):
                raise  # another pipe, for example to a worker
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest at its exit
        raise SystemExit(1) from None


class ProgressDisplay:
    """Progress of one task.

    Args:
        title: name of the task.
        total: number of steps.
        enabled: False: display nothing.
        show_ends: without a terminal, also print a line at the first and the last step.
        print_line: prints a line if there is no terminal; None: `print`.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        enabled: bool = True,
        show_ends: bool = False,
        print_line: Callable[[str], None] | None = None,
    ) -> None:
        self.title, self.total, self.enabled, self.show_ends = title, total, enabled, show_ends
        self._console = Console(file=sys.stderr)
        self._print_line = print_line or self.print
        self._last_line_s = time.monotonic()
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

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are finished. Without a terminal, print a line at most every 15 seconds."""
        if not self.enabled:
            return
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        is_end = self.show_ends and (self._first is None or done == self.total)
        self._first = self._first or (now, done)
        is_due = is_end or now - self._last_line_s > LINE_INTERVAL_S
        if is_due and not self._console.is_terminal:
            self._last_line_s = now
            eta = self._remaining_time(now, done)
            self._print_line(" ".join(filter(None, (f"{self.title} {done}/{self.total}", note, eta))))

    def _remaining_time(self, now: float, done: int) -> str:
        assert self._first is not None
        start, first = self._first
        if done == first:
            return "ETA ?"
        seconds = round((now - start) / (done - first) * (self.total - done))
        return f"ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def print(self, text: str) -> None:
        """Print one line above the bar."""
        if self.enabled:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(
    title: str, total: int, *, enabled: bool = True, show_ends: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(n)``, which adds `n` finished steps to the display."""
    done = 0
    with ProgressDisplay(title, total, enabled=enabled, show_ends=show_ends) as display:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            display.update(done)

        yield advance
