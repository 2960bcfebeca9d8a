"""A DataLoader that tells the death of a worker from what breaks by it."""

import signal
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader

_ENDING_SECONDS = 1.0  # between the first sign of a worker's end, a connection that breaks, and its last file closed


class ClipLoader(DataLoader):
    """torch's, which tells a dead worker only where the kernel has buried it.

    A dying worker closes its connections first. A batch that is being read then fails with ``Connection reset by
    peer``, which tells nobody what happened.
    """

    def __iter__(self) -> Any:
        """The batches; workers start to fetch at once.

        Raises:
            RuntimeError: a worker has ended; names it and what ended it.
        """
        return _watched(super().__iter__())


def _watched(batches: Iterator[Any]) -> Iterator[Any]:
    workers = getattr(batches, "_workers", ())  # none where this process reads
    try:
        yield from batches
    except (OSError, EOFError, RuntimeError) as error:  # what torch knows of a worker's end it raises as RuntimeError
        ended = wait([w.sentinel for w in workers], 0 if isinstance(error, RuntimeError) else _ENDING_SECONDS)
        dead = [w for w in workers if w.sentinel in ended]
        if not dead:
            raise
        told = ", ".join(f"{w.pid} ({_how_it_ended(w)})" for w in dead)
        raise RuntimeError(
            f"DataLoader worker ended: {told}. If the machine's memory was full, lower num_workers or batch_size"
        ) from None


def _how_it_ended(worker: Any) -> str:
    worker.join()
    code = int(worker.exitcode)
    return signal.Signals(-code).name if code < 0 else f"status {code}"
