"""What a process does for all that runs in it."""

from tests.commands import run_python

_LAST_TO_RUN = """
import atexit, sys, tempfile, torch
from mmdistill.runtime import start_process
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
