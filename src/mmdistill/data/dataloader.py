"""A DataLoader that reports why a worker died."""

import signal
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader

_WORKER_EXIT_WAIT_S = 1.0  # a broken connection is noticed before the process of the worker has exited


class ClipLoader(DataLoader[Any]):
    """torch's DataLoader, with an error message that names the dead worker and the signal that ended it.

    A dying worker closes its connections before it exits. Without this class, reading its batch fails with
    ``Connection reset by peer``.
    """

    def __iter__(self) -> Any:
        """The batches. Workers start to fetch immediately.

        Raises:
            RuntimeError: a worker has exited; names its process and the signal or exit status.
        """
        return _iterate_with_worker_check(super().__iter__())


def _iterate_with_worker_check(batches: Iterator[Any]) -> Iterator[Any]:
    workers = getattr(batches, "_workers", ())  # absent with num_workers=0
    try:
        yield from batches
    except (OSError, EOFError, RuntimeError) as error:
        # torch raises RuntimeError only after the worker has exited
        exited = wait([w.sentinel for w in workers], 0 if isinstance(error, RuntimeError) else _WORKER_EXIT_WAIT_S)
        dead = [w for w in workers if w.sentinel in exited]
        if not dead:
            raise
        message = ", ".join(f"{w.pid} ({_worker_exit_reason(w)})" for w in dead)
        raise RuntimeError(
            f"DataLoader worker exited: {message}. If the machine ran out of memory, lower num_workers or batch_size"
        ) from None


def _worker_exit_reason(worker: Any) -> str:
    """Name of the signal, or exit status."""
    worker.join()
    code = int(worker.exitcode)
    return signal.Signals(-code).name if code < 0 else f"status {code}"
