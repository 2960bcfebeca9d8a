"""A DataLoader whose workers survive stop signals, and which reports why a worker died."""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

# Schedulers, container runtimes and terminals send a stop signal to every process of a job. The main process finishes
# its step and saves, for which it needs its workers, so the workers ignore these signals.
PROTECTED_SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")]
_WORKER_EXIT_WAIT_S = 1.0  # a broken connection is noticed before the process of the worker has exited


class ClipLoader(DataLoader[Any]):
    """A DataLoader whose workers ignore stop signals, and which reports why a worker ended.

    torch's own workers end on SIGTERM, and the main process then fails before it can save. These end when the main
    process closes the loader, exits or is killed.

    A worker that is killed closes its connections first. A batch that is being read then fails with ``Connection reset
    by peer``, so this class waits for the worker's exit status and reports that.
    """

    def __init__(self, *args: Any, worker_init_fn: Callable[[int], None] | None = None, **options: Any) -> None:
        super().__init__(*args, worker_init_fn=_WorkerInit(worker_init_fn), **options)  # type: ignore[misc]

    def __iter__(self) -> Any:
        """The batches. Workers start to fetch immediately.

        Raises:
            RuntimeError: a worker has exited; names its process and the signal or exit status.
        """
        with blocked_signals(PROTECTED_SIGNALS):  # a signal during the start of the workers stays pending
            batches = super().__iter__()
        _WORKERS.update(getattr(batches, "_workers", ()))
        return _iterate_with_worker_check(batches)


@contextmanager
def blocked_signals(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Block signals in this thread until the end of the block, and in processes that start meanwhile.

    Windows cannot block signals; there this does nothing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@dataclass(frozen=True)
class _WorkerInit:
    """Runs in a worker before its first batch. Picklable, for workers that are spawned."""

    worker_init_fn: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        for number in PROTECTED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PROTECTED_SIGNALS)
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


_WORKERS: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


@atexit.register
def _kill_hung_workers() -> None:
    """Kill workers that torch could not stop: multiprocessing ends them with SIGTERM, which they ignore, and waits.

    Registered before torch registers its own cleanup, so it runs after that.
    """
    for worker in list(_WORKERS):
        if worker.is_alive():
            worker.kill()


def _iterate_with_worker_check(batches: Iterator[Any]) -> Iterator[Any]:
    workers = getattr(batches, "_workers", ())  # absent with num_workers=0
    try:
        yield from batches
    except (OSError, EOFError, RuntimeError) as error:
        # torch raises RuntimeError only after the worker has exited
        exited = wait([w.sentinel for w in workers], 0 if isinstance(error, RuntimeError) else _WORKER_EXIT_WAIT_S)
        exited_workers = [w for w in workers if w.sentinel in exited]
        if not exited_workers:
            raise
        message = ", ".join(f"{w.pid} ({_worker_exit_reason(w)})" for w in exited_workers)
        raise RuntimeError(
            f"DataLoader worker exited: {message}. If the machine ran out of memory, lower num_workers or batch_size"
        ) from None


def _worker_exit_reason(worker: Any) -> str:
    """Name of the signal, or exit status."""
    worker.join()
    code = int(worker.exitcode)
    return signal.Signals(-code).name if code < 0 else f"status {code}"
