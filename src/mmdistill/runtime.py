"""One process of a run: its device, precision, seeds, place among other processes, and its wish to stop."""

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch

INTERRUPTED_EXIT_CODE = 85  # a whole checkpoint was written after SIGTERM, SIGINT or SIGUSR1; `resume=auto` goes on


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


def start_process(*, accelerator: str, seed: int) -> Process:
    """Choose the device, seed every generator, flush denormals.

    Works under `torchrun`, `deepspeed`, SLURM with the usual variables, and plain `python`, for which the variables of
    a world of one are set. Call it before any tensor work: threads inherit the denormal flag from their creator.
    """
    torch.set_flush_denormal(True)  # a pretraining step spends 90 % of its time in denormals otherwise
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu, but torch sees no GPU; use accelerator=auto or cpu")
    use_gpu = accelerator != "cpu" and torch.cuda.is_available()
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(world)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    seed_everything(seed)
    if use_gpu:
        torch.cuda.set_device(local_rank)
    return Process(torch.device("cuda", local_rank) if use_gpu else torch.device("cpu"), rank, world_size)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bf16 on a GPU that has it, else fp32: bf16 on a plain CPU is hundreds of times slower."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a precision."""
    if precision == "32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """While open, SIGTERM, SIGINT and SIGUSR1 only set a flag: the loop asks for it after each step.

    Yields a function that returns the number of the signal received, or None. A second SIGINT acts at once.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
