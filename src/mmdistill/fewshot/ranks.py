"""This process among those that evaluate together."""

import torch


def grouped() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return torch.distributed.get_rank() if grouped() else 0
