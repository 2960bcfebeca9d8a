"""Precision, autocast and memory allocation."""

import ctypes
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdistill.config import ConfigError
from mmdistill.distributed import device
from mmdistill.distributed.device import autocast, has_fp16, resolve_precision, tune_malloc

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_fp16_on_cpu_raises() -> None:
    message = "^precision=16 needs a GPU, and this run is on a CPU; use precision=32 or precision=bf16$"
    with pytest.raises(ConfigError, match=message):
        resolve_precision("16", CPU)
    assert resolve_precision("16", GPU) == "16"
    assert (has_fp16(CPU), has_fp16(GPU)) == (False, True)


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_given_precision_is_kept(precision: str, device: torch.device) -> None:
    assert resolve_precision(precision, device) == precision


@pytest.mark.parametrize(("capability", "selected"), [(7, "32"), (8, "bf16"), (9, "bf16")])
def test_auto_is_bf16_only_on_a_gpu_with_bf16_instructions(
    capability: int, selected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU of compute capability 7 emulates bf16, which torch counts as supported by default."""
    monkeypatch.setattr(device, "log_once", logging.getLogger("mmdistill").warning)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert resolve_precision("auto", GPU) == selected
    line = (
        "Tesla T4 has no bf16 instructions, so precision=auto selects 32; precision=16 is faster and needs less memory"
    )
    assert caplog.messages == ([line] if capability < 8 else [])


@pytest.mark.parametrize(
    ("capabilities", "selected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "32"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"architecture": "arm64"}, "32"),
        (None, "32"),  # a version of torch that does not tell
    ],
)
def test_auto_is_bf16_on_a_cpu_with_bf16_products(
    capabilities: dict[str, Any] | None, selected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == selected


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_sets_the_type_of_products(precision: str, dtype: torch.dtype) -> None:
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype


def test_autocast_of_16_is_fp16() -> None:
    context = autocast("16", CPU)
    assert isinstance(context, torch.autocast)
    assert context.fast_dtype is torch.float16


class RecordingLibrary:
    """glibc that records the calls of ``mallopt`` and what they return."""

    def __init__(self) -> None:
        self.library = _LOAD("libc.so.6")
        self.calls: list[tuple[int, int]] = []
        self.results: list[int] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        self.results.append(self.library.mallopt(parameter, value))
        return self.results[-1]


_LOAD = ctypes.CDLL


def test_tune_malloc_sets_what_glibc_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordingLibrary()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    tune_malloc()
    assert library.calls == [(-3, 32 * 2**20), (-1, 2**31 - 1), (-8, 1)]
    assert library.results == [1, 1, 1]  # 0: rejected


@pytest.mark.parametrize("error", [OSError("no such library"), AttributeError("mallopt")])
def test_tune_malloc_does_nothing_without_glibc(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", load)
    tune_malloc()
