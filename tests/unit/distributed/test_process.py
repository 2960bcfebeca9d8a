"""What `start_process` sets. Threads, workers and the end of a process: tests/integration."""

import atexit
import importlib
import os
import random
import sys
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmdistill.config import ConfigError
from mmdistill.distributed import process, rendezvous
from mmdistill.distributed.process import Process, disable_shm_op, set_deepspeed_accelerator, start_process

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher; what a test sets is removed afterwards."""
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)


def test_plain_python_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(process, "tune_malloc", lambda: calls.append("malloc"))
    monkeypatch.setattr(atexit, "register", lambda function: calls.append(function.__name__))
    found = start_process(accelerator="cpu", seed=3)
    assert (found.device, found.rank, found.world_size, found.is_main) == (torch.device("cpu"), 0, 1, True)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert calls == ["malloc", "destroy_process_group_at_exit"]
    assert not dist.is_initialized()


def test_seed_sets_every_generator() -> None:
    drawn = []
    for _ in range(2):
        start_process(accelerator="cpu", seed=3)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_denormal_numbers_are_flushed() -> None:
    start_process(accelerator="cpu", seed=0)
    assert torch.full((8,), 1e-30).mul(1e-9).view(torch.int32).count_nonzero() == 0


def test_gpu_without_a_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match="accelerator=gpu, but torch finds no GPU; use accelerator=auto or accelerator=cpu"
    ):
        start_process(accelerator="gpu", seed=0)


def test_timeout_applies_to_every_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed creates groups of its own, which would wait for a hung rank for 30 minutes."""
    core = dist.distributed_c10d
    calls: list[tuple[str, timedelta]] = []
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(core, name, getattr(core, name))
    monkeypatch.setattr(
        rendezvous, "init_process_group", lambda backend, timeout, gpu: calls.append((backend, timeout))
    )
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = start_process(accelerator="cpu", seed=0, timeout_s=77)
    assert (found.rank, found.world_size, found.is_main) == (1, 2, False)
    assert calls == [("gloo", timedelta(seconds=77))]
    assert core._get_default_timeout("gloo") == timedelta(seconds=77)


def test_only_rank_zero_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        Process(torch.device("cpu"), rank, 2).rank_zero_info(f"from {rank}")
    assert capsys.readouterr() == ("", "from 0\n")


@pytest.mark.parametrize(
    ("current", "requested", "set_to"), [("cuda", "cpu", ["CPU"]), ("cpu", "cpu", []), ("cpu", "cuda", ["CUDA"])]
)
def test_imported_deepspeed_changes_its_accelerator(
    current: str, requested: str, set_to: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    modules: dict[str, dict[str, Any]] = {
        "deepspeed": {},
        "deepspeed.accelerator": {
            "get_accelerator": lambda: SimpleNamespace(_name=current),
            "set_accelerator": calls.append,
        },
        "deepspeed.accelerator.cpu_accelerator": {"CPU_Accelerator": lambda: "CPU"},
        "deepspeed.accelerator.cuda_accelerator": {"CUDA_Accelerator": lambda: "CUDA"},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    set_deepspeed_accelerator(requested)
    assert os.environ["DS_ACCELERATOR"] == requested
    assert calls == set_to


def test_process_group_is_destroyed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    for initialized in (False, True):
        monkeypatch.setattr(dist, "is_initialized", lambda initialized=initialized: initialized)
        process.destroy_process_group_at_exit()
    assert calls == ["destroyed"]


def test_disabled_shm_op_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("deepspeed.comm.torch")
    monkeypatch.setattr(backend, "build_shm_op", lambda: "built")
    disable_shm_op()
    assert backend.build_shm_op() is None


class FakeGpus:
    """CUDA queries of a process that sees `count` GPUs."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", self.used.append)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
        properties = SimpleNamespace(uuid="GPU-7")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


@pytest.mark.parametrize(("count", "local_rank", "used"), [(1, 3, 0), (2, 3, 1), (4, 3, 3)])
def test_task_that_sees_fewer_gpus_than_ranks_uses_one_that_it_sees(
    count: int, local_rank: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``srun --gpus-per-task=1``: every task sees one GPU, with number 0."""
    gpus, joined = FakeGpus(count, monkeypatch), []
    monkeypatch.setattr(rendezvous, "init_process_group", lambda backend, timeout, gpu: joined.append((backend, gpu)))
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(name, value)
    assert start_process(accelerator="auto", seed=0).device == torch.device("cuda", used)
    assert gpus.used == [used]
    assert os.environ["LOCAL_RANK"] == str(used)
    assert joined == [("nccl", "GPU-7")]
