"""Precision, autocast and memory allocation of the device that a run uses."""

import ctypes
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch

from mmdistill.config import ConfigError
from mmdistill.console import log_once
from mmdistill.distributed.collectives import get_rank

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # constants of malloc.h in glibc


def tune_malloc() -> None:
    """Make glibc keep freed memory for later allocations instead of returning it to the system (``mallopt``).

    Each training step allocates the same amount again. Without this setting every step maps its activations page by
    page, with 8,000 to 15,000 page faults, which take 3 % of a pretraining step of ViT-S on a CPU. Without glibc this
    function does nothing.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum; larger blocks are still mapped singly
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_ARENA_MAX, 1)  # memory of other arenas is returned at any threshold


def resolve_precision(precision: str, device: torch.device) -> str:
    """Precision of a run: ``32``, ``bf16`` or ``16``.

    ``auto`` becomes ``bf16`` on a device that has bf16 instructions and ``32`` otherwise: on a CPU without them bf16 is
    several hundred times slower than fp32, and GPUs without them convert to fp32 and back. On such a GPU rank 0 logs
    which setting is faster.

    Raises:
        ConfigError: ``16`` on a CPU, where DeepSpeed has no fp16 and Lightning would use bf16 instead.
    """
    if precision == "16" and not has_fp16(device):
        raise ConfigError("precision=16 needs a GPU, and this run is on a CPU; use precision=32 or precision=bf16")
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    if get_rank() == 0:
        log_once(
            f"{torch.cuda.get_device_name(device)} has no bf16 instructions, so precision=auto selects 32; "
            "precision=16 is faster and needs less memory"
        )
    return "32"


def _cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 matrix products (AMX or AVX512-BF16). Old versions of torch do not tell: False."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def has_fp16(device: torch.device) -> bool:
    """Whether fp16 training works on this device."""
    return device.type == "cuda"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast context of a resolved precision (``32``, ``bf16`` or ``16``); ``32`` disables autocast."""
    if precision == "32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
