"""The rate of matrix products of a device, with which the speed of a training is compared."""

import time
from functools import cache

import torch
from torch import Tensor

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}  # by precision
_TIME_LIMIT_S, _TIME_PER_SIZE_S = 0.25, 0.03
_SMALLEST, _LARGEST = 256, 4096  # rows and columns


@cache
def measure_matrix_rate(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """FLOP/s of the fastest product of two square matrices on a device; on a CPU with `num_threads`, those of torch.

    On a CPU one thread is measured, too: where other processes use the cores, several threads wait for each other and
    can be slower than one. No random generator is used. The result is kept for later trainings of this process.
    """
    if device.type != "cpu" or num_threads == 1:
        return _measure(device, dtype)
    try:
        torch.set_num_threads(1)
        single = _measure(device, dtype)
    finally:
        torch.set_num_threads(num_threads)
    return max(single, _measure(device, dtype))


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The size is doubled while there is time for a product of the next size; each size is measured several times."""
    size, best = _SMALLEST, 0.0
    end = time.perf_counter() + _TIME_LIMIT_S
    while True:
        x = _make_matrix(size, device, dtype)
        fastest = _time_product(x)  # the first one also starts threads and libraries
        size_end = time.perf_counter() + _TIME_PER_SIZE_S
        while time.perf_counter() < size_end:
            fastest = min(fastest, _time_product(x))
        best = max(best, 2.0 * size**3 / fastest)
        if size == _LARGEST or 9 * fastest > end - time.perf_counter():
            return best
        size *= 2


def _make_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Different values in [0, 1): a GPU is faster if all values are the same."""
    row = torch.arange(size, device=device) * 0.618034
    return (row[:, None] * row).frac().to(dtype)


def _time_product(x: Tensor) -> float:
    """Seconds of ``x @ x``."""
    start = time.perf_counter()
    x @ x
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return max(time.perf_counter() - start, 1e-9)
