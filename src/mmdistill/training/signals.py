"""Stop signals: SIGTERM, SIGINT and SIGUSR1 set a flag that the training loop reads."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from mmdistill.console import program_name
from mmdistill.distributed import launch
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE

RESEND_S = 0.05  # seconds until an ignored stop signal is sent again
StopSignal = Callable[[], int | None]  # the number of the received signal, or None


@contextmanager
def stop_signals(names: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR1")) -> Iterator[StopSignal]:
    """While open, these signals are only recorded. A second SIGINT raises `KeyboardInterrupt` at once.

    Yields:
        A function that returns the number of the first received signal, or None. A launcher that has exited counts as
        SIGTERM.
    """
    received: list[int] = []

    def record_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    def first_received() -> int | None:
        if received:
            return received[0]
        return int(signal.SIGTERM) if launch.launcher_exited() else None

    with launch.signal_handler(names, record_signal):
        yield first_received


def stop_message(checkpoint: Path, run_dir: Path) -> str:
    """The last message of a run in `run_dir` that a signal stopped after it wrote `checkpoint`.

    It contains the overrides that resume the run, or the sweep of which the run is a job, quoted for the shell.
    """
    key, folder = "hydra.run.dir", str(run_dir)
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        key, folder = "hydra.sweep.dir", str(Path(HydraConfig.get().sweep.dir).absolute())
    return (
        f"stopped by a signal; complete checkpoint written: {checkpoint}\n"
        f"to resume, add to the same command: resume=auto {shlex.quote(f'{key}={folder}')}"
    )


@contextmanager
def exit_on_stop_signal(names: Sequence[str], *, hint: str = "run the same command again") -> Iterator[None]:
    """While open, a stop signal ends the process with status 85 and one line, for work that has nothing to save.

    The line ends with `hint`, which tells how to repeat the work.

    Python ignores an exception that a handler raises during a callback, such as a finalizer or a fork hook. The signal
    is then sent again.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(INTERRUPTED_EXIT_CODE)

    def send_again(ignored: "sys.UnraisableHookArgs") -> None:
        if isinstance(ignored.exc_value, SystemExit) and ignored.exc_value.code == INTERRUPTED_EXIT_CODE:
            threading.Timer(RESEND_S, os.kill, (os.getpid(), signal.Signals[names[0]])).start()
        else:
            previous_hook(ignored)

    previous_hook, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        with launch.signal_handler(names, leave):
            yield
    except SystemExit as error:
        if error.code == INTERRUPTED_EXIT_CODE:
            print(f"{program_name()}: stopped by a signal; {hint}", file=sys.stderr, flush=True)
        raise
    finally:
        sys.unraisablehook = previous_hook
