"""One process of a run: its device, precision, seeds, place among other processes, and its wish to stop."""

import atexit
import ctypes
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from mmdistill.config import ConfigError
from mmdistill.distributed import launch
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE

__all__ = ["INTERRUPTED_EXIT_CODE"]  # whose home is `launch`, which imports no torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


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
    _tell_deepspeed("cuda" if use_gpu else "cpu")
    if not use_gpu:
        keep_heap()
    if "RANK" not in os.environ:
        launch.world_of_one()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    seed_everything(seed)
    if use_gpu:
        torch.cuda.set_device(local_rank)
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)
    if world_size > 1 and not torch.distributed.is_initialized():
        backend, timeout = "nccl" if use_gpu else "gloo", timedelta(seconds=timeout_s)
        torch.distributed.init_process_group(backend, timeout=timeout)
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of the groups that DeepSpeed makes of its own
            setattr(torch.distributed.distributed_c10d, name, timeout)
    return Process(torch.device("cuda", local_rank) if use_gpu else torch.device("cpu"), rank, world_size)


def _tell_deepspeed(name: str) -> None:
    """Name DeepSpeed's accelerator: by itself it takes a GPU wherever it is imported and there is one."""
    os.environ["DS_ACCELERATOR"] = name
    if "deepspeed" not in sys.modules:
        return
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    if get_accelerator()._name != name:
        set_accelerator(CUDA_Accelerator() if name == "cuda" else CPU_Accelerator())


def keep_heap() -> None:
    """Let this process keep the memory it has freed, for the next step needs as much again (glibc's `mallopt`).

    Otherwise each step's activations come from the system anew, page by page: 8,000 to 15,000 faults and 3 % of a
    pretraining step of ViT-S on a CPU. Nothing happens where there is no glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes: larger blocks are still the system's own
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_ARENA_MAX, 1)  # arenas of other threads are given back whatever the threshold


def _leave_group() -> None:
    """End the group's threads while Python still runs.

    A gloo thread that lets go of a tensor while the interpreter shuts down aborts the process: 11 of 50 that ended
    right after an all-reduce.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def mean_over_ranks(values: Sequence[torch.Tensor]) -> list[float]:
    """The average of each scalar over all ranks, in one all-reduce."""
    stacked = torch.stack([v.detach().float() for v in values])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(stacked)
        stacked /= torch.distributed.get_world_size()
    return [float(v) for v in stacked.tolist()]


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is true on one."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return flag
    seen = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
    return bool(seen.item())


def common_folder(process: Process, folder: Path) -> Path:
    """Rank 0's run folder, absolute, on every rank: the others have none of their own."""
    told = [str(folder.absolute())]
    if process.world_size > 1:
        torch.distributed.broadcast_object_list(told, src=0)
    return Path(told[0])


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Make what a training step draws a function of its place alone, so a resumed run needs no generator state."""
    torch.manual_seed(hash((seed, epoch, batch, rank)) % 2**63)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bf16 on a GPU that has it, else fp32: bf16 on a plain CPU is hundreds of times slower.

    Raises:
        ConfigError: ``16`` on a CPU. DeepSpeed has no fp16 there, and Lightning would take bf16 instead.
    """
    if precision == "16" and not has_fp16(device):
        raise ConfigError("precision=16 needs a GPU, and this run is on a CPU; use precision=32 (or bf16)")
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32"


def has_fp16(device: torch.device) -> bool:
    """Whether trainings in fp16 work there."""
    return device.type == "cuda"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a precision."""
    if precision == "32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def stop_signals(names: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR1")) -> Iterator[Callable[[], int | None]]:
    """While open, these signals only set a flag: the loop asks for it after each step.

    Yields a function that returns the number of the signal received, or None. A launcher that has gone away counts as
    SIGTERM. A second SIGINT acts at once.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    def asked() -> int | None:
        if received:
            return received[0]
        return int(signal.SIGTERM) if launch.abandoned() else None

    before = {number: signal.signal(number, note) for number in (signal.Signals[name] for name in names)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
