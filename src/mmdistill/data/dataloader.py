"""A DataLoader whose workers survive stop signals, and which reports why a worker died."""

import atexit
import copy
import errno
import gc
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.profiler import record_function
from torch.utils.data import DataLoader

from mmdistill.errors import InputError, MMDistillError
from mmdistill.files import record_process, temporary_folder_until_exit

# Schedulers, container runtimes and terminals send a stop signal to every process of a job. The main process finishes
# its step and saves, for which it needs its workers, so the workers ignore these signals.
PROTECTED_SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")]
_SHM = "/dev/shm"  # where Linux keeps shared memory and the semaphores of multiprocessing
_SHM_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOSYS)
_MAX_SOCKET_DIR_LENGTH = 60  # of at most 103 to 107 characters; 37 are for the names of folder and socket
_CHECK_INTERVAL_S = 1.0  # between two looks at the workers
_WORKER_EXIT_WAIT_S = 1.0  # an error of a connection is noticed before the process of the worker has exited
_BROKEN_CONNECTION_WAIT_S = 10.0  # a connection to a worker only breaks if the worker exits, slowly on a busy machine


class ClipLoader(DataLoader[Any]):
    """A DataLoader whose workers ignore stop signals, and which reports why a worker ended.

    torch's own workers end on SIGTERM, and the main process then fails before it can save. These end when the main
    process closes the loader, exits or is killed.

    A worker that is killed closes its connections first. A batch that is being read then fails with ``Connection reset
    by peer``, so this class waits for the worker's exit status and reports that.
    """

    def __init__(self, *args: Any, worker_init_fn: Callable[[int], None] | None = None, **options: Any) -> None:
        super().__init__(*args, worker_init_fn=_WorkerInit(worker_init_fn), **options)  # type: ignore[misc]
        if self.num_workers > 0:
            dataset = getattr(self.dataset, "dataset", self.dataset)  # of a `Subset`
            with _explain_shared_memory_errors(self.num_workers):
                getattr(dataset, "share_memory", lambda: None)()

    def _get_iterator(self) -> Any:
        """Make torch look every second whether the workers live, also within a `timeout`.

        Its handler of SIGCHLD is removed: it raises an exception at any line, for example while checkpoints are
        pruned, and is too late for a worker that ends before it is set.
        """
        with _unchanged_sigchld_handler(), self._events_without_locks():
            batches: Any = super()._get_iterator()
        if self.num_workers:
            get_data, queue = type(batches)._try_get_data, batches._data_queue
            # strong references would be cycles, which keep the workers until a garbage collection
            batches._try_get_data = partial(_get_data_with_checks, partial(get_data, weakref.proxy(batches)))
            get = partial(type(queue).get, weakref.proxy(queue))
            queue.get = partial(_get_or_wait_for_exit, get, batches._workers)
        return batches

    @contextmanager
    def _events_without_locks(self) -> Iterator[None]:
        """While open, an iterator and its workers share a `_Flag` in place of a `multiprocessing.Event`."""
        context = self.multiprocessing_context
        if self.num_workers:
            changed: Any = copy.copy(context or multiprocessing.get_context())
            changed.Event = _Flag
            self.multiprocessing_context = changed
        try:
            yield
        finally:
            self.multiprocessing_context = context

    def __iter__(self) -> Any:
        """The batches. Workers start to fetch immediately.

        Raises:
            WorkerExitError: a worker has exited; names its process and the signal or exit status.
            SharedMemoryError: workers cannot use /dev/shm.
        """
        if self.num_workers:
            _share_temporary_folder()
        with (  # a signal during the start of the workers stays pending
            blocked_signals(PROTECTED_SIGNALS),
            _explain_shared_memory_errors(self.num_workers, errors=_SHM_ERRORS if self.num_workers else ()),
            _explain_worker_exits(getattr(self._iterator, "_workers", ())),  # those of the last epoch
        ):
            batches = super().__iter__()
        _WORKERS.update(getattr(batches, "_workers", ()))
        return _iterate_with_worker_check(batches)


class _Flag:
    """A `multiprocessing.Event` without a lock, which all processes share.

    Workers test it before each batch. If a worker is killed while it holds the lock of an event, the main process waits
    for this lock forever.
    """

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


@contextmanager
def _unchanged_sigchld_handler() -> Iterator[None]:
    """Restore the handler of SIGCHLD that is changed in the block. Windows has no SIGCHLD."""
    number = getattr(signal, "SIGCHLD", None)
    handler = signal.getsignal(number) if number else None
    try:
        yield
    finally:
        if number and signal.getsignal(number) is not handler:
            signal.signal(number, handler or signal.SIG_DFL)


def _get_data_with_checks(get_data: Callable[[float], tuple[bool, Any]], timeout: float = 5.0) -> tuple[bool, Any]:
    """``get_data(timeout)``, which raises a RuntimeError if a worker has ended, in parts of `_CHECK_INTERVAL_S`."""
    end = time.monotonic() + timeout
    while True:
        is_done, data = get_data(min(timeout, _CHECK_INTERVAL_S))
        if is_done or time.monotonic() >= end:
            return is_done, data


def _get_or_wait_for_exit(get: Callable[..., Any], workers: Sequence[BaseProcess], **options: Any) -> Any:
    """``get()``. A worker that is killed breaks its connection first, so an error is raised after the worker has ended.

    For an error while all workers live, torch creates temporary files, to look for the limit of open files.
    """
    try:
        return get(**options)
    except (OSError, EOFError):
        ended = wait([worker.sentinel for worker in workers], _BROKEN_CONNECTION_WAIT_S)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join()  # its files are closed shortly before it has ended
        raise


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


class WorkerExitError(MMDistillError, RuntimeError):
    """A worker has ended before its work was done, such as by SIGKILL."""


class SharedMemoryError(MMDistillError):
    """Workers need more shared memory than there is."""

    exit_status = InputError.exit_status


@contextmanager
def _explain_shared_memory_errors(num_workers: int, *, errors: Sequence[int] = ()) -> Iterator[None]:
    """While open, errors about shared memory become a `SharedMemoryError`, and so does an `OSError` of `errors`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        text = str(error)
        if getattr(error, "errno", None) not in errors and "shared memory" not in text:
            raise
        reason = next((os.strerror(n) for n in _SHM_ERRORS if os.strerror(n) in text), "Bus error")
        size = f"{shutil.disk_usage(_SHM).total // 1024:,} kB" if os.path.isdir(_SHM) else "missing"
        raise SharedMemoryError(
            f"num_workers={num_workers}: data loading processes cannot use shared memory ({reason}; {_SHM}: {size}); "
            "set num_workers=0, or give the container more, for example with docker run --shm-size=8g"
        ) from None


@dataclass(frozen=True)
class _WorkerInit:
    """Runs in a worker before its first batch. Picklable, for workers that are spawned."""

    worker_init_fn: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        gc.freeze()  # a fork must not finalize inherited garbage: queues of another loader would close their files
        for number in PROTECTED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PROTECTED_SIGNALS)
        sys.excepthook = _print_unless_connection_lost
        record_process(Path(multiprocessing.util.get_temp_dir()))
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


def _print_unless_connection_lost(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    """For a worker's thread that sends batches: it loses its connection if the main process is killed."""
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, tb)


def _share_temporary_folder() -> None:
    """Give the processes that this one starts one folder for their sockets.

    By default each worker creates its own, ``/tmp/pymp-*``, which remains if the worker is killed. In a long ``TMPDIR``
    the path of a socket would be too long, and the first batch would never arrive.
    """
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" not in config:
        is_long = len(tempfile.gettempdir()) > _MAX_SOCKET_DIR_LENGTH
        config["tempdir"] = temporary_folder_until_exit("/tmp" if is_long else None)
        record_process(Path(config["tempdir"]))


_WORKERS: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


@atexit.register
def _kill_hung_workers() -> None:
    """Kill workers that torch could not stop: multiprocessing ends them with SIGTERM, which they ignore, and waits.

    Registered before torch registers its own cleanup, so it runs after that.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the handler of torch would raise in any exit handler
    for worker in list(_WORKERS):
        if worker.is_alive():
            worker.kill()


def _iterate_with_worker_check(batches: Iterator[Any]) -> Iterator[Any]:
    workers = getattr(batches, "_workers", ())  # absent with num_workers=0
    with _explain_worker_exits(workers), _explain_shared_memory_errors(len(workers)):
        fetched = iter(batches)
        while True:
            with record_function("wait for data"):  # in the trace of `trainer.profile`
                batch = next(fetched, None)
            if batch is None:
                return
            yield batch


@contextmanager
def _explain_worker_exits(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """While open, an error that occurs because one of these processes has exited becomes a `WorkerExitError`."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        # torch raises RuntimeError only after the worker has exited
        exited = wait([w.sentinel for w in workers], 0 if isinstance(error, RuntimeError) else _WORKER_EXIT_WAIT_S)
        exited_workers = [w for w in workers if w.sentinel in exited]
        if not exited_workers:
            raise
        message = ", ".join(f"{w.pid} ({_worker_exit_reason(w)})" for w in exited_workers)
        raise WorkerExitError(
            f"DataLoader worker exited: {message}. If the machine ran out of memory, lower num_workers or batch_size"
        ) from None


def _worker_exit_reason(worker: Any) -> str:
    """Name of the signal, or exit status."""
    worker.join()
    code = int(worker.exitcode)
    return signal.Signals(-code).name if code < 0 else f"status {code}"
