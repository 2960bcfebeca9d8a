"""Cores of a job: affinity, control groups and SLURM."""

import io
import os
from typing import Any

import pytest
from joblib.externals.loky.backend import context

from mmdistill.data import cores
from mmdistill.data.cores import available_cores, default_loader_workers

V2, V1 = "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_"


@pytest.fixture(autouse=True)
def machine_of_64_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "LOKY_MAX_CPU_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    set_affinity(64, monkeypatch)
    set_files({}, monkeypatch)


def set_affinity(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))


def set_files(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the control group, as joblib reads them."""

    class Paths:
        exists = staticmethod(lambda path: path in files)

    fake: Any = type("FakeOs", (), {"path": Paths, "__getattr__": lambda self, name: getattr(os, name)})()
    monkeypatch.setattr(context, "os", fake)
    monkeypatch.setattr(context, "open", lambda path: io.StringIO(files[path]), raising=False)


@pytest.mark.parametrize(
    ("files", "count"),
    [({}, 64), ({V2: "max 100000"}, 64), ({V2: "400000 100000"}, 4), ({V2: "150000 100000"}, 2),
     ({f"{V1}quota_us": "800000", f"{V1}period_us": "100000"}, 8),
     ({f"{V1}quota_us": "-1", f"{V1}period_us": "100000"}, 64)],
)  # fmt: skip
def test_quota_of_the_control_group(files: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_files(files, monkeypatch)
    assert available_cores() == count


def test_affinity_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    set_affinity(12, monkeypatch)
    assert available_cores() == 12
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert available_cores() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "48")  # of another step: the binding counts
    assert available_cores() == 12


@pytest.mark.parametrize(
    ("cpus", "ranks", "environment", "workers"),
    [
        (1, "1", {}, 1),
        (2, "1", {}, 1),
        (8, "1", {}, 7),
        (64, "1", {}, cores.MAX_LOADER_WORKERS),
        (16, "4", {}, 3),  # devices=4
        (64, "4", {"SLURM_CPUS_PER_TASK": "8"}, 7),  # srun with 4 tasks of 8 cores
        (64, "4", {"SLURM_CPUS_PER_TASK": "32", "TORCHELASTIC_RUN_ID": "1"}, 7),  # one torchrun per machine
    ],
)
def test_loader_workers_use_the_cores_of_the_rank(
    cpus: int, ranks: str, environment: dict[str, str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_affinity(cpus, monkeypatch)
    for name, value in {"LOCAL_WORLD_SIZE": ranks, **environment}.items():
        monkeypatch.setenv(name, value)
    assert default_loader_workers() == workers
