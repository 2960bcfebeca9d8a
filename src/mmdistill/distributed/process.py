"""Start one process of a run: device, seeds, process group."""

import atexit
import importlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from mmdistill.config import ConfigError
from mmdistill.distributed import launch, rendezvous
from mmdistill.distributed.device import tune_malloc
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE
from mmdistill.randomness import seed_everything

__all__ = ["INTERRUPTED_EXIT_CODE", "Process", "start_process"]


@dataclass(frozen=True)
class Process:
    """Device and global rank of this process, and the number of processes of the run."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes files."""
        return self.rank == 0

    def rank_zero_info(self, text: str) -> None:
        """Print a line to standard error on rank 0."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


def start_process(*, accelerator: str, seed: int, timeout_s: float = 1800.0) -> Process:
    """Select the device, seed all generators, flush denormal numbers to zero, and join the process group if any.

    Works under ``torchrun``, ``deepspeed``, ``srun`` and plain ``python``; under the last, the environment variables of
    a single rank are set. Call it before any tensor operation: a thread inherits the denormal setting of its creator.

    Args:
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        seed: seed of the global generators of Python, NumPy and torch.
        timeout_s: seconds that a rank waits for the others in a collective before it raises.

    Raises:
        ConfigError: ``accelerator="gpu"``, but torch finds no GPU.
        RendezvousError: the ranks cannot connect, or ranks of two runs have met.
    """
    torch.set_flush_denormal(True)  # denormals take 90 % of a pretraining step otherwise
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator=gpu, but torch finds no GPU; use accelerator=auto or accelerator=cpu")
    use_gpu = accelerator != "cpu" and torch.cuda.is_available()
    set_deepspeed_accelerator("cuda" if use_gpu else "cpu")
    if not use_gpu:
        tune_malloc()
    if "RANK" not in os.environ:
        launch.set_single_process_env()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    seed_everything(seed)
    if use_gpu:
        local_rank %= torch.cuda.device_count()  # each task of srun may see its own GPU only
        os.environ["LOCAL_RANK"] = str(local_rank)  # Lightning and DeepSpeed use the GPU of this number
        torch.cuda.set_device(local_rank)
    atexit.unregister(destroy_process_group_at_exit)
    atexit.register(destroy_process_group_at_exit)
    if world_size > 1 and not torch.distributed.is_initialized():
        backend, timeout = "nccl" if use_gpu else "gloo", timedelta(seconds=timeout_s)
        gpu = rendezvous.gpu_id(local_rank) if use_gpu else ""
        rendezvous.init_process_group(backend, timeout=timeout, gpu=gpu)
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of groups that DeepSpeed creates itself
            setattr(torch.distributed.distributed_c10d, name, timeout)
    return Process(torch.device("cuda", local_rank) if use_gpu else torch.device("cpu"), rank, world_size)


def prepare_deepspeed_import() -> None:
    """Without a GPU, select the CPU before DeepSpeed is imported, which otherwise logs that it finds no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def set_deepspeed_accelerator(name: str) -> None:
    """Set the accelerator of DeepSpeed, ``cuda`` or ``cpu``. By default it takes a GPU even for a CPU run."""
    os.environ["DS_ACCELERATOR"] = name
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    if get_accelerator()._name != name:
        set_accelerator(CUDA_Accelerator() if name == "cuda" else CPU_Accelerator())


def disable_shm_op() -> None:
    """Let DeepSpeed create its backend without the shared-memory op of CPUs, in this process.

    Only tensor-parallel inference calls the op, and it falls back to an all-reduce. DeepSpeed compiles the op at the
    first CPU run of an environment, which needs a compiler and takes up to minutes.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def destroy_process_group_at_exit() -> None:
    """Destroy the process group, and with it the threads of gloo, before the interpreter shuts down.

    A gloo thread that releases a tensor during the shutdown aborts the process: measured in 11 of 50 processes that
    ended right after an all-reduce.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
