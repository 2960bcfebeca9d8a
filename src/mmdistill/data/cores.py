"""Number of processor cores that a job was given."""

import os
import sys

MAX_LOADER_WORKERS = 16


def available_cores() -> int:
    """Cores that this process may use, at least 1.

    The minimum of the affinity, the quota of the control group (version 1 or 2), ``LOKY_MAX_CPU_COUNT`` and, under
    SLURM, ``SLURM_CPUS_PER_TASK``, because not every cluster binds a task to its cores.
    """
    from joblib import cpu_count  # type: ignore[import-untyped]  # here, because the import takes 0.1 s

    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, min(int(cpu_count()), int(slurm) if slurm.isdigit() else sys.maxsize))


def default_loader_workers() -> int:
    """Data loading processes of one rank: one per core of the rank but its own, from 1 to `MAX_LOADER_WORKERS`.

    The ranks that torchrun, deepspeed or ``devices=N`` start on a machine share the cores. A task of srun has its own.
    """
    has_own_cores = "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    num_ranks = 1 if has_own_cores else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_LOADER_WORKERS, max(1, available_cores() // num_ranks - 1))
