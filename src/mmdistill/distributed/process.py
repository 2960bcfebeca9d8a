"""One process of a run: its device, precision, seeds, place among other processes, and its wish to stop."""

import atexit
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch

from mmdistill.config import ConfigError
from mmdistill.distributed import launch
from mmdistill.distributed.device import tune_malloc
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE
from mmdistill.randomness import seed_everything

__all__ = ["INTERRUPTED_EXIT_CODE"]  # whose home is `launch`, which imports no torch


@dataclass(frozen=True)
class Process:
    """Where and as which of several processes this one runs."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes single files."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """A line on standard error, from rank 0 only."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


def start_process(*, accelerator: str, seed: int, timeout_s: float = 1800.0) -> Process:
    """Choose the device, seed every generator, flush denormals, and join the other ranks where there are any.

    Works under `torchrun`, `deepspeed`, `srun`, and plain `python`, for which the variables of a world of one are set.
    Call it before any tensor work: threads inherit the denormal flag from their creator.

    Args:
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        seed: of every generator.
        timeout_s: seconds that a rank waits for the others before it raises.
    """
    torch.set_flush_denormal(True)  # a pretraining step spends 90 % of its time in denormals otherwise
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("accelerator=gpu, but torch sees no GPU; use accelerator=auto or cpu")
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
        torch.cuda.set_device(local_rank)
    atexit.unregister(destroy_process_group_at_exit)
    atexit.register(destroy_process_group_at_exit)
    if world_size > 1 and not torch.distributed.is_initialized():
        backend, timeout = "nccl" if use_gpu else "gloo", timedelta(seconds=timeout_s)
        torch.distributed.init_process_group(backend, timeout=timeout)
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of the groups that DeepSpeed makes of its own
            setattr(torch.distributed.distributed_c10d, name, timeout)
    return Process(torch.device("cuda", local_rank) if use_gpu else torch.device("cpu"), rank, world_size)


def set_deepspeed_accelerator(name: str) -> None:
    """Name DeepSpeed's accelerator: by itself it takes a GPU wherever it is imported and there is one."""
    os.environ["DS_ACCELERATOR"] = name
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    if get_accelerator()._name != name:
        set_accelerator(CUDA_Accelerator() if name == "cuda" else CPU_Accelerator())


def destroy_process_group_at_exit() -> None:
    """End the group's threads while Python still runs.

    A gloo thread that lets go of a tensor while the interpreter shuts down aborts the process: 11 of 50 that ended
    right after an all-reduce.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
