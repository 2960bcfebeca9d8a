"""Run independent encoders in parallel threads on a CPU."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch
from torch import Tensor

# per batch; with more tokens, parallel encoders evict each other's data from the caches
MAX_TOKENS_FOR_THREADING = 1500


def run_in_parallel(jobs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """The results of `jobs`, in order. Torch's threads are divided evenly among the jobs that run at the same time.

    Threads that share one matrix product synchronize after it and after every small operation. On two cores, four
    ViT-S encoders take 1.15 s in parallel and 1.35 s in sequence with 672 tokens; with 2,688 tokens they are slower in
    parallel. The jobs inherit the gradient mode and autocast.
    """
    num_threads = torch.get_num_threads()
    num_workers = math.gcd(len(jobs), num_threads)  # all workers get the same number of jobs and threads
    if num_workers < 2:
        return [job() for job in jobs]
    grad_enabled = torch.is_grad_enabled()
    autocast_enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run_job(job: Callable[[], Tensor]) -> Tensor:
        # a job uses each weight once, so it needs no cache of converted weights
        cast = torch.autocast("cpu", dtype=dtype, enabled=autocast_enabled, cache_enabled=False)
        with torch.set_grad_enabled(grad_enabled), cast:
            return job()

    return list(_make_pool(num_workers, num_threads // num_workers, num_threads).map(run_job, jobs))


@cache
def _make_pool(num_workers: int, threads_per_worker: int, num_threads: int) -> ThreadPoolExecutor:
    """Worker threads that use `threads_per_worker` torch threads each; the caller keeps `num_threads`."""

    def init_worker() -> None:
        torch.set_flush_denormal(True)  # per thread
        torch.get_num_threads()  # the first call in a thread applies the process-wide number; make it now
        torch.set_num_threads(threads_per_worker)  # of this thread, and of threads started later

    pool, barrier = ThreadPoolExecutor(num_workers, "encoder", init_worker), Barrier(num_workers)
    for started in [pool.submit(barrier.wait) for _ in range(num_workers)]:
        started.result()
    torch.set_num_threads(num_threads)
    return pool
