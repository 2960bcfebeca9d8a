"""The error of a loader whose worker dies, without real workers."""

import faulthandler
import gc
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from mmdistill.data.dataloader import (
    ClipLoader,
    WorkerExitError,
    _get_or_wait_for_exit,
    _iterate_with_worker_check,
    _print_unless_connection_lost,
)


class FakeBatches:
    """Batches of a process that has exited, as torch's iterator reports them."""

    def __init__(self, error: Exception, *workers: object) -> None:
        self.error, self._workers = error, workers

    def __iter__(self) -> Iterator[int]:
        yield 1
        raise self.error


def _exited(action: Callable[[], None]) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    return process


def test_error_names_the_worker_and_its_signal_or_status() -> None:
    killed = _exited(lambda: os.kill(os.getpid(), signal.SIGKILL))
    failed = _exited(lambda: os._exit(3))
    for error in (ConnectionResetError(), EOFError(), RuntimeError("worker exited")):
        batches = _iterate_with_worker_check(FakeBatches(error, killed, failed))  # type: ignore[arg-type]
        assert next(batches) == 1
        with pytest.raises(WorkerExitError, match=rf"exited: {killed.pid} \(SIGKILL\), {failed.pid} \(status 3\)\. If"):
            next(batches)


def test_other_errors_are_not_changed() -> None:
    batches = _iterate_with_worker_check(FakeBatches(RuntimeError("out of range")))  # type: ignore[arg-type]
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match=r"^out of range$"):
        next(batches)


def test_batches_are_those_of_the_dataset() -> None:
    loader = ClipLoader(TensorDataset(torch.arange(5)), batch_size=2)  # type: ignore[arg-type]
    assert [batch[0].tolist() for batch in loader] == [[0, 1], [2, 3], [4]]


def _in_fork(folder: Path, function: Callable[[], None]) -> None:
    """Run a function in a fork whose folder for temporary files is ``folder``: that of this process is in use."""

    def run() -> None:
        tempfile.tempdir = str(folder)
        multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
        function()
        os._exit(5)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 5


def _one_worker(loader: ClipLoader) -> tuple[Iterator[Any], BaseProcess]:
    """The batches of a loader and its only worker; a child of an earlier test may still run."""
    earlier = set(multiprocessing.active_children())
    batches = iter(loader)
    (worker,) = set(multiprocessing.active_children()) - earlier
    return batches, worker


def test_killed_worker_leaves_no_socket_in_the_folder_for_temporary_files() -> None:
    """All workers use one folder, which the main process removes. pytest's folders are too long for sockets."""

    def load() -> None:
        batches, worker = _one_worker(ClipLoader(TensorDataset(torch.zeros(8)), num_workers=1))
        next(batches)
        worker.kill()
        with pytest.raises(RuntimeError, match=r"signal: Killed|SIGKILL"):
            list(batches)
        folder = Path(multiprocessing.util.get_temp_dir())
        assert set(short.iterdir()) == {folder, folder.with_name(f"{folder.name}.lock")}
        assert list(folder.glob("listener-*"))
        processes = {path.name for path in folder.glob("process-*")}
        assert processes == {f"process-{os.getpid()}", f"process-{worker.pid}"}

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="short") as name:
        short = Path(name)
        _in_fork(short, load)


class _KilledWithLock(torch.utils.data.Dataset[int]):
    """The worker is killed while it tests whether the loader has ended."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:
            assert frame.f_back is not None
            frame = frame.f_back
        condition = getattr(frame.f_locals["done_event"], "_cond", None)
        if condition is not None:  # the lock of a `multiprocessing.Event`
            condition.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_worker_that_is_killed_with_a_lock_does_not_block_the_main_process(method: str, tmp_path: Path) -> None:
    def load() -> None:
        faulthandler.dump_traceback_later(60, exit=True)
        loader = ClipLoader(_KilledWithLock(), num_workers=1, multiprocessing_context=method)
        with pytest.raises(WorkerExitError, match=r"SIGKILL|Killed"):
            list(loader)
        assert loader.multiprocessing_context.get_start_method() == method

    _in_fork(tmp_path, load)


def test_workers_run_in_a_long_folder_for_temporary_files(tmp_path: Path) -> None:
    long = tmp_path / ("a" * 80)
    long.mkdir()

    def load() -> None:
        assert len(list(ClipLoader(TensorDataset(torch.zeros(2)), num_workers=1, timeout=30))) == 2

    _in_fork(long, load)


class _Blocked(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        time.sleep(60)
        return index


def test_killed_worker_raises_only_while_a_batch_is_awaited() -> None:
    """torch's handler of SIGCHLD raises an exception at any line, for example while checkpoints are pruned."""
    handler = signal.getsignal(signal.SIGCHLD)
    batches, worker = _one_worker(ClipLoader(_Blocked(), num_workers=1, timeout=30))
    assert signal.getsignal(signal.SIGCHLD) is handler
    worker.kill()
    worker.join()
    with pytest.raises(WorkerExitError, match=r"DataLoader worker exited: \d+ \(SIGKILL\)"):
        next(batches)


def test_worker_that_is_killed_between_two_epochs_is_named() -> None:
    loader = ClipLoader(TensorDataset(torch.zeros(2)), num_workers=1, persistent_workers=True)
    batches, worker = _one_worker(loader)
    assert len(list(batches)) == 2
    worker.kill()
    worker.join()
    with pytest.raises(WorkerExitError, match=r"DataLoader worker exited: \d+ \(SIGKILL\)"):
        list(loader)


def test_torch_creates_no_temporary_files_if_a_worker_dies() -> None:
    """A broken connection is noticed before the worker has ended; torch then looks for the limit of open files."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()

    def get(timeout: float) -> None:
        threading.Timer(0.1, process.kill).start()
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        _get_or_wait_for_exit(get, [process], timeout=1.0)
    assert not process.is_alive()


def test_worker_prints_no_traceback_if_the_main_process_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (EOFError(), ConnectionResetError(), BrokenPipeError()):
        _print_unless_connection_lost(type(error), error, None)
    assert capsys.readouterr().err == ""
    _print_unless_connection_lost(ValueError, ValueError("a defect"), None)
    assert "a defect" in capsys.readouterr().err


def test_workers_end_with_their_loader_and_not_at_a_garbage_collection() -> None:
    gc.disable()
    try:
        loader = ClipLoader(TensorDataset(torch.zeros(2)), num_workers=1, persistent_workers=True)
        batches, worker = _one_worker(loader)
        assert len(list(batches)) == 2
        assert worker.is_alive(), "workers persist between epochs"
        del batches, loader
        worker.join(30)
        assert not worker.is_alive()
    finally:
        gc.enable()


class _Garbage:
    """A cycle that reports its finalization."""

    def __init__(self, report: Path) -> None:
        self.me, self.report = self, report

    def __del__(self) -> None:
        with self.report.open("a") as file:
            file.write(f"{os.getpid()}\n")


class _Collecting(TensorDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        gc.collect()
        return super().__getitem__(index)


def test_workers_do_not_finalize_garbage_of_the_main_process(tmp_path: Path) -> None:
    gc.disable()
    try:
        _Garbage(tmp_path / "finalized")
        assert len(list(ClipLoader(_Collecting(torch.zeros(2)), num_workers=1))) == 2
        assert not (tmp_path / "finalized").exists()
        gc.collect()
        assert (tmp_path / "finalized").read_text() == f"{os.getpid()}\n"
    finally:
        gc.enable()
