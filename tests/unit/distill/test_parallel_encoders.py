"""Jobs that run in parallel give the results of jobs that run in sequence."""

import threading
from collections.abc import Iterator

import pytest
import torch

from mmdistill.distill import parallel_encoders
from mmdistill.distill.parallel_encoders import run_in_parallel


@pytest.fixture(params=[2, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set this number of torch threads, independent of the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_jobs_divide_the_threads_and_keep_their_order(threads: int) -> None:
    barrier = threading.Barrier(2, timeout=60)

    def job(index: int) -> torch.Tensor:
        if index < 2:
            barrier.wait()  # returns only if two jobs run at the same time
        return torch.tensor([index, torch.get_num_threads(), torch.is_grad_enabled()])

    rows = torch.stack(run_in_parallel([lambda n=n: job(n) for n in range(4)]))
    assert rows[:, 0].tolist() == [0, 1, 2, 3]
    assert set(rows[:, 1].tolist()) == {threads // min(threads, 4)}
    assert rows[:, 2].all()
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        assert not torch.stack(run_in_parallel([lambda: job(2), lambda: job(3)]))[:, 2].any()


def test_denormals_are_flushed_in_the_workers(threads: int) -> None:
    torch.set_flush_denormal(False)  # threads inherit their creator's setting
    parallel_encoders._make_pool.cache_clear()
    tiny = torch.full((4,), 1e-30)
    assert (tiny * 1e-12).any()
    assert not any(out.any() for out in run_in_parallel([lambda: tiny * 1e-12] * 4))


def test_jobs_run_in_sequence_if_the_threads_cannot_be_divided(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(parallel_encoders, "_make_pool", None)
    assert len(run_in_parallel([lambda: torch.zeros(1)] * 3)) == 3


def test_error_of_a_job_is_raised(threads: int) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_in_parallel([lambda: torch.zeros(1), fail])


def test_jobs_inherit_autocast(threads: int) -> None:
    def job() -> torch.Tensor:
        return torch.zeros(2, 2) @ torch.zeros(2, 2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [out.dtype for out in run_in_parallel([job] * 2)] == [torch.bfloat16] * 2
        with torch.autocast("cpu", enabled=False):
            assert [out.dtype for out in run_in_parallel([job] * 2)] == [torch.float32] * 2
    assert [out.dtype for out in run_in_parallel([job] * 2)] == [torch.float32] * 2


def test_jobs_run_in_sequence_with_one_thread(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def fail(*_: int) -> None:
        raise AssertionError("threads were used")

    monkeypatch.setattr(parallel_encoders, "_make_pool", fail)
    torch.set_num_threads(1)
    assert len(run_in_parallel([lambda: torch.zeros(1)] * 2)) == 2
