"""Errors about exhausted memory, and the memory of a failed job."""

import gc
import weakref

import numpy as np
import pytest
import torch

from mmdistill.cli.memory import OutOfMemoryError, explain_memory_errors, release_memory
from mmdistill.data.dataloader import WorkerExitError

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.01 GiB is free."
)
KEYS = "lower batch_size, or set precision=bf16 or trainer.activation_checkpointing=true"


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (torch.OutOfMemoryError(CUDA), "the GPU is out of memory while 2.00 GiB were requested"),
        (RuntimeError("CUDA error: out of memory\nmore lines"), "the GPU is out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), "the GPU is out of memory"),
        (MemoryError(), "this machine is out of memory"),
    ],
)
def test_exhausted_memory_is_one_sentence_with_three_keys(error: Exception, start: str) -> None:
    with pytest.raises(OutOfMemoryError) as raised, explain_memory_errors():
        raise error
    assert str(raised.value) == f"{start}; {KEYS}"


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_messages_of_torch_and_numpy_are_recognized(allocate: object) -> None:
    message = r"^this machine is out of memory while .+ were requested; lower"
    with pytest.raises(OutOfMemoryError, match=message), explain_memory_errors():
        allocate(2**58 // 8)  # type: ignore[operator]


def test_a_killed_worker_is_not_reported_as_exhausted_memory() -> None:
    """Its error says what happened, and that exhausted memory is one possible cause."""
    text = "DataLoader worker exited: 7 (SIGKILL). If the machine ran out of memory, lower num_workers or batch_size"
    with pytest.raises(WorkerExitError, match=r"^DataLoader worker exited"), explain_memory_errors():
        raise WorkerExitError(text)


def test_other_errors_are_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shape"), explain_memory_errors():
        raise RuntimeError("shape mismatch")


class Network:
    """An object with a reference cycle, like a network."""

    def __init__(self) -> None:
        self.own = self


def test_memory_of_a_failed_job_is_released() -> None:
    networks: list[weakref.ref[Network]] = []

    def job() -> None:
        network = Network()
        networks.append(weakref.ref(network))
        raise torch.OutOfMemoryError(CUDA)

    gc.disable()
    try:
        with pytest.raises(OutOfMemoryError) as raised, explain_memory_errors():
            job()
        release_memory()
        assert networks[0]() is None  # although the error still exists
        assert raised.value
    finally:
        gc.enable()
