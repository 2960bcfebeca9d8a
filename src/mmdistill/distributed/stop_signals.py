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
RESEND_S = 0.05  # seconds until a stop signal without effect is sent again


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

    The handler raises `SystemExit`. A bare ``except`` of a library, or Python itself in a finalizer or a fork hook, can
    drop this exception. The signal is therefore sent again until the block ends or another handler replaces this one.
    """
    received: list[int] = []
    closed = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            sender.start()
        elif _is_exiting():  # do not interrupt the cleanup
            return
        raise SystemExit(INTERRUPTED_EXIT_CODE)

    def send_again() -> None:
        while not closed.wait(RESEND_S):
            os.kill(os.getpid(), received[0])
            if signal.getsignal(received[0]) is not leave:
                return

    def hide_exit(ignored: "sys.UnraisableHookArgs") -> None:
        if not (received and isinstance(ignored.exc_value, SystemExit)):
            previous_hook(ignored)

    sender = threading.Thread(target=send_again, daemon=True)
    previous_hook, sys.unraisablehook = sys.unraisablehook, hide_exit
    try:
        with signal_handler(names, leave):
            try:
                yield
            finally:
                closed.set()
                if received:
                    sender.join()
    except SystemExit:
        if received and os.environ.get("RANK", "0") == "0":
            from mmdistill.console import program_name

            print(f"{program_name()}: stopped by a signal; {hint}", file=sys.stderr, flush=True)
        raise
    finally:
        sys.unraisablehook = previous_hook


def _is_exiting() -> bool:
    """Whether the interrupted code handles a `SystemExit`, for example in a `finally` block."""
    error = sys.exception()
    while error is not None and not isinstance(error, SystemExit):
        error = error.__context__
    return error is not None
