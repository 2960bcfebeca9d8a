"""The error of a loader whose worker dies, without real workers."""

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import TensorDataset

from mmdistill.data.dataloader import ClipLoader, _iterate_with_worker_check


class FakeBatches:
    """Batches of a process that has exited, as torch's iterator reports them."""

    def __init__(self, error: Exception, *workers: object) -> None:
        self.error, self._workers = error, workers

    def __iter__(self) -> Iterator[int]:
        yield 1
        raise self.error


def _exited(action: object) -> multiprocessing.Process:
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
        with pytest.raises(RuntimeError, match=rf"exited: {killed.pid} \(SIGKILL\), {failed.pid} \(status 3\)\. If"):
            next(batches)


def test_other_errors_are_not_changed() -> None:
    batches = _iterate_with_worker_check(FakeBatches(RuntimeError("out of range")))  # type: ignore[arg-type]
    assert next(batches) == 1
    with pytest.raises(RuntimeError, match=r"^out of range$"):
        next(batches)


def test_batches_are_those_of_the_dataset() -> None:
    loader = ClipLoader(TensorDataset(torch.arange(5)), batch_size=2)  # type: ignore[arg-type]
    assert [batch[0].tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
