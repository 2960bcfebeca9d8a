"""Precision, autocast and memory settings of the device that a run uses."""

import ctypes
from contextlib import AbstractContextManager, nullcontext, suppress

import torch

from mmdistill.config import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def tune_malloc() -> None:
    """Let this process keep the memory it has freed, for the next step needs as much again (glibc's `mallopt`).

    Otherwise each step's activations come from the system anew, page by page: 8,000 to 15,000 faults and 3 % of a
    pretraining step of ViT-S on a CPU. Nothing happens where there is no glibc.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes: larger blocks are still the system's own
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_ARENA_MAX, 1)  # arenas of other threads are given back whatever the threshold


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
