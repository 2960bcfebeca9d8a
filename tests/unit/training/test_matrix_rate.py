"""The measurement of the rate of matrix products: its time limit, its result, no random numbers."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mmdistill.training import matrix_rate

Measure = Callable[..., tuple[float, list[int]]]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """``measure(RATE)``: the measured rate of a device with this rate in FLOP/s, and the sizes of its products."""
    clock, sizes = [0.0], []
    monkeypatch.setattr(matrix_rate.time, "perf_counter", lambda: clock[0])

    def time_product(x: torch.Tensor, rate: float, delayed_until: float) -> float:
        sizes.append(len(x))
        seconds = max(2 * len(x) ** 3 / rate, 0.016 if clock[0] < delayed_until else 0)
        clock[0] += seconds
        return seconds

    def run(rate: float, *, delayed_until: float = 0) -> tuple[float, list[int]]:
        monkeypatch.setattr(matrix_rate, "_time_product", lambda x: time_product(x, rate, delayed_until))
        found = matrix_rate.measure_matrix_rate.__wrapped__(torch.device("cpu"), torch.float32, 1)
        assert clock[0] < 0.5
        return found, sizes

    return run


def test_slow_device_multiplies_small_matrices(measure: Measure) -> None:
    rate, sizes = measure(1e9)  # 0.03 s for the smallest product
    assert (rate, set(sizes)) == (pytest.approx(1e9), {256})


def test_fast_device_multiplies_large_matrices(measure: Measure) -> None:
    rate, sizes = measure(6e14)
    assert rate == pytest.approx(6e14)
    assert (max(sizes), sizes.count(4096) > 100) == (4096, True)


def test_processes_that_start_at_the_same_time_delay_some_products_only(measure: Measure) -> None:
    rate, _ = measure(1e11, delayed_until=0.1)
    assert rate == pytest.approx(1e11)


def test_threads_that_wait_for_each_other_do_not_lower_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    rates = {1: 1e11, 2: 1e9}
    monkeypatch.setattr(matrix_rate, "_measure", lambda device, dtype: rates[torch.get_num_threads()])
    try:
        torch.set_num_threads(2)
        assert matrix_rate.measure_matrix_rate.__wrapped__(torch.device("cpu"), torch.float32, 2) == 1e11
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_measurement_uses_no_random_generator() -> None:
    def states() -> list[object]:
        return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]

    before = states()
    rate = matrix_rate.measure_matrix_rate.__wrapped__(torch.device("cpu"), torch.float32, torch.get_num_threads())
    assert 1e9 < rate < 1e14
    assert states() == before
