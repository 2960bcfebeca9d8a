"""Processes that read or write data files in parallel, and that end with the command."""

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def process_pool(workers: int, *, initializer: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes. OpenCV's threads do not survive a fork.

    If the block ends with an exception, such as by Ctrl-C or SIGTERM, the processes are killed and jobs that wait are
    dropped. `ProcessPoolExecutor` itself would wait for all jobs, also for those of a process that has ended.
    """
    earlier = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=initializer)
    with exit_on_sigterm():
        try:
            yield pool
        except BaseException:
            for process in set(multiprocessing.active_children()) - earlier:
                process.kill()
            pool.shutdown(cancel_futures=True)  # it waits for nothing but its own thread now
            raise
        pool.shutdown()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Exit on SIGTERM with an exception, so that `finally` blocks end the other processes. Main thread only."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
