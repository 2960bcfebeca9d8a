"""Exhausted memory: one line instead of a traceback, and memory for the next job of a sweep. Imports no torch."""

import gc
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmdistill.errors import MMDistillError

_MESSAGES = r"out of memory|DefaultCPUAllocator|not enough memory|CUBLAS_STATUS_ALLOC_FAILED"
_AMOUNT = r"allocate ([\d.,]+ [A-Z]?i?B|\d+ bytes)"


class OutOfMemoryError(MMDistillError):
    """The memory of the GPU or of the machine is exhausted."""


@contextmanager
def explain_memory_errors() -> Iterator[None]:
    """While open, an error of torch, NumPy or Python about exhausted memory becomes an `OutOfMemoryError`.

    The local variables of the functions that have failed are cleared, because their tensors occupy the memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        explained = isinstance(error, MMDistillError)  # such as a killed worker: its message names the fix
        if explained or (not isinstance(error, MemoryError) and not re.search(_MESSAGES, text)):
            raise
        traceback.clear_frames(error.__traceback__)
        amount = re.search(_AMOUNT, text, re.IGNORECASE)
        device = "the GPU" if re.search("CUDA|HIP|CUBLAS", text) else "this machine"
        tried = f" while {amount[1]} were requested" if amount else ""
        raise OutOfMemoryError(
            f"{device} is out of memory{tried}; lower batch_size, or set precision=bf16 or "
            "trainer.activation_checkpointing=true"
        ) from None


def release_memory() -> None:
    """Free the memory of objects that nothing uses any more, on the CPU and on the GPU."""
    gc.collect()  # networks and optimizers contain reference cycles
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
