"""Settings of a process that hold in every thread and loader worker, and until it ends."""

from pathlib import Path

import pytest

from tests.commands import run_python

_AT_EXIT = """
import atexit, sys, tempfile, torch
from mmdistill.distributed.process import start_process
atexit.register(lambda: print("in the group" if torch.distributed.is_initialized() else "destroyed", file=sys.stderr))
for _ in range(2):  # the second call, as in a sweep, changes nothing
    start_process(accelerator="cpu", seed=0)
torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
work = torch.distributed.all_reduce(torch.ones(1), async_op=True)
"""


def test_process_group_is_destroyed_before_the_interpreter_shuts_down() -> None:
    """Otherwise a gloo thread that frees a tensor during the shutdown aborts a run that had succeeded."""
    done = run_python("-c", _AT_EXIT)
    assert done.returncode == 0
    assert done.stderr.split() == ["destroyed"]


def test_objects_are_frozen_before_the_last_garbage_collections() -> None:
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import mmdistill.cli"
    assert run_python("-c", code).stdout.split() == ["True"]


# Number of denormal products: in the main thread, in all intra-op threads, in a backward pass, in a loader worker.
_DENORMALS = """
import sys, torch
from torch.utils.data import DataLoader
from mmdistill.data.dataset import init_worker
from mmdistill.distributed.process import start_process

def count_denormals(n):
    return torch.full((n,), 1e-30).mul(1e-9).view(torch.int32).count_nonzero().item()

class Products:
    def __len__(self): return 1
    def __getitem__(self, i): return count_denormals(8)

def count_everywhere():
    x = torch.full((1 << 20,), 1e-30, requires_grad=True)
    x.mul(1e-9).backward(torch.full((1 << 20,), 1e-30))
    loader = DataLoader(Products(), num_workers=1, worker_init_fn=init_worker, multiprocessing_context=start_method)
    worker = next(iter(loader))
    return [count_denormals(8), count_denormals(1 << 20), x.grad.view(torch.int32).count_nonzero().item(), int(worker)]

if __name__ == "__main__":
    start_method = sys.argv[1]
    if len(sys.argv) == 2:
        start_process(accelerator="cpu", seed=0)
    torch.set_num_threads(4)
    print(count_everywhere())
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_denormals_are_flushed_in_every_thread_and_in_loader_workers(start_method: str, tmp_path: Path) -> None:
    script = tmp_path / "denormals.py"
    script.write_text(_DENORMALS)
    assert run_python(script, start_method).stdout.split("\n")[-2] == "[0, 0, 0, 0]"


def test_denormals_occur_without_start_process(tmp_path: Path) -> None:
    script = tmp_path / "denormals.py"
    script.write_text(_DENORMALS)
    assert run_python(script, "fork", "without").stdout.split("\n")[-2] == f"[8, {1 << 20}, {1 << 20}, 0]"
