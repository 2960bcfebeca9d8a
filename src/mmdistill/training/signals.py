"""Stop signals: SIGTERM, SIGINT and SIGUSR1 set a flag that the training loop reads."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mmdistill.distributed import launch


@contextmanager
def stop_signals(names: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR1")) -> Iterator[Callable[[], int | None]]:
    """While open, these signals only set a flag: the loop asks for it after each step.

    Yields a function that returns the number of the signal received, or None. A launcher that has gone away counts as
    SIGTERM. A second SIGINT acts at once.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    def asked() -> int | None:
        if received:
            return received[0]
        return int(signal.SIGTERM) if launch.launcher_exited() else None

    before = {number: signal.signal(number, note) for number in (signal.Signals[name] for name in names)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
