"""End a command at a stop signal while it has nothing to save. Imports the standard library only.

`mmdistill.training.signals` replaces these handlers during a training, which writes a checkpoint first.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

INTERRUPTED_EXIT_CODE = 85  # stopped by a signal; `resume=auto` continues from the last complete checkpoint
KEYBOARD_INTERRUPT_EXIT_CODE = 130  # Ctrl-C while no stop signal is recorded, for example during the imports
RESEND_S = 0.05  # seconds until an ignored stop signal is sent again


@contextmanager
def signal_handler(names: Sequence[str], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install `handler` for those of these signals that the platform has; restore the previous handlers at the end."""
    numbers = [number for number in signal.Signals if number.name in names]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


@contextmanager
def exit_on_stop_signal(names: Sequence[str], *, hint: str = "run the same command again") -> Iterator[None]:
    """While open, a stop signal ends the process with status 85, and rank 0 prints one line.

    The line ends with `hint`, which tells how to repeat the work.

    Python ignores an exception that a handler raises during a callback, such as a finalizer or a fork hook. The signal
    is then sent again.
    """
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(INTERRUPTED_EXIT_CODE)

    def send_again(ignored: "sys.UnraisableHookArgs") -> None:
        if received and isinstance(ignored.exc_value, SystemExit):
            threading.Timer(RESEND_S, os.kill, (os.getpid(), received[-1])).start()
        else:
            previous_hook(ignored)

    previous_hook, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        with signal_handler(names, leave):
            yield
    except SystemExit:
        if received and os.environ.get("RANK", "0") == "0":
            from mmdistill.console import program_name

            print(f"{program_name()}: stopped by a signal; {hint}", file=sys.stderr, flush=True)
        raise
    finally:
        sys.unraisablehook = previous_hook
