"""The rate of matrix products of a device, with which the speed of a training is compared."""

import time
from functools import cache

import torch
from torch import Tensor

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}  # by precision
_TIME_LIMITS_S = {"cpu": 0.06, "cuda": 0.3}  # a GPU loads the code of each size first
_SMALLEST, _LARGEST = 64, 4096  # rows and columns


@cache
def measure_matrix_rate(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """FLOP/s of the fastest product of two square matrices on a device; on a CPU with `num_threads`, those of torch.

    The size is doubled while there is time for the next products, also where a product is slow. No random generator is
    used. The result is kept for later trainings of this process.
    """
    size, best = _SMALLEST, 0.0
    x = _make_matrix(size, device, dtype)
    _time_product(x)  # starts threads and libraries
    end = time.perf_counter() + _TIME_LIMITS_S[device.type]
    while True:
        seconds = _time_product(x)
        best, left_s = max(best, 2.0 * size**3 / seconds), end - time.perf_counter()
        if seconds > left_s:
            return best
        if size < _LARGEST and 16 * seconds < left_s:  # two products of the next size
            size *= 2
            x = _make_matrix(size, device, dtype)
            _time_product(x)  # the first one is slower


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
