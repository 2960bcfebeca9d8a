"""What a process does for all that runs in it."""

from pathlib import Path

import pytest
import torch

from mmdistill.config import ConfigError
from mmdistill.distributed.device import resolve_precision
from tests.commands import run_python

_LAST_TO_RUN = """
import atexit, sys, tempfile, torch
from mmdistill.distributed.process import start_process
atexit.register(lambda: print("left" if not torch.distributed.is_initialized() else "in the group", file=sys.stderr))
for _ in range(2):  # the second call, as in a sweep, changes nothing
    start_process(accelerator="cpu", seed=0)
torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
work = torch.distributed.all_reduce(torch.ones(1), async_op=True)
"""


def test_a_process_leaves_its_group_before_python_shuts_down() -> None:
    """Else a gloo thread that frees a tensor too late aborts a run that had succeeded."""
    done = run_python("-c", _LAST_TO_RUN)
    assert done.returncode == 0
    assert done.stderr.split() == ["left"]


# Bits of products that are denormal: of the main thread, of all intra-op threads, of a backward pass, of a worker.
_DENORMALS = """
import sys, torch
from torch.utils.data import DataLoader
from mmdistill.data.dataset import init_worker
from mmdistill.distributed.process import start_process

def left(n):
    return torch.full((n,), 1e-30).mul(1e-9).view(torch.int32).count_nonzero().item()

class Products:
    def __len__(self): return 1
    def __getitem__(self, i): return left(8)

def all_found():
    x = torch.full((1 << 20,), 1e-30, requires_grad=True)
    x.mul(1e-9).backward(torch.full((1 << 20,), 1e-30))
    worker = next(iter(DataLoader(Products(), num_workers=1, worker_init_fn=init_worker, multiprocessing_context=way)))
    return [left(8), left(1 << 20), x.grad.view(torch.int32).count_nonzero().item(), int(worker)]

if __name__ == "__main__":
    way = sys.argv[1]
    if len(sys.argv) == 2:
        start_process(accelerator="cpu", seed=0)
    torch.set_num_threads(4)
    print(all_found())
"""


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_denormals_are_flushed_in_every_thread_and_in_loader_workers(way: str, tmp_path: Path) -> None:
    script = tmp_path / "denormals.py"
    script.write_text(_DENORMALS)
    assert run_python(script, way).stdout.split("\n")[-2] == "[0, 0, 0, 0]"


def test_denormals_would_be_there_otherwise(tmp_path: Path) -> None:
    script = tmp_path / "denormals.py"
    script.write_text(_DENORMALS)
    assert run_python(script, "fork", "without").stdout.split("\n")[-2] == f"[8, {1 << 20}, {1 << 20}, 0]"


def test_fp16_on_a_cpu_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="precision=16 needs a GPU, and this run is on a CPU; use precision=32"):
        resolve_precision("16", torch.device("cpu"))
    assert resolve_precision("auto", torch.device("cpu")) == "32"


_FAULTS = """
import resource, sys, torch
from mmdistill.distributed.process import start_process
start_process(accelerator="cpu", seed=0)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        for kept in [[torch.ones(4 * 2**20) for _ in range(4)]]:  # 64 MiB at once, then all freed
            pass
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), file=sys.stderr)
"""


def test_a_process_keeps_its_memory() -> None:
    """Else each round fetches 16,384 pages of 4 KiB from the system anew."""
    done = run_python("-c", _FAULTS)
    assert done.returncode == 0
    assert int(done.stderr.split()[-1]) < 16_384
