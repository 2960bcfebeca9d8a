"""Data loading in a container whose /dev/shm is small or read-only, simulated in a mount namespace."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, environment

LOADER = """
import torch
from torch.utils.data import Dataset
from mmdistill.builders import make_clip_loader
from mmdistill.data.dataloader import SharedMemoryError

class Clips(Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return torch.ones(50_000)

for num_workers in (0, 1):
    try:
        print(sum(batch.sum().item() for batch in make_clip_loader(Clips(), num_workers=num_workers, pin_memory=False)))
    except SharedMemoryError as error:
        print(error)
"""
REASONS = {
    "size=64k": "No space left on device; /dev/shm: 64 kB",
    "size=64k,ro": "Read-only file system; /dev/shm: 64 kB",
}


def _can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not _can_mount(), reason="needs unshare and user namespaces")
@pytest.mark.parametrize("options", REASONS)
def test_small_or_read_only_shared_memory(options: str, tmp_path: Path) -> None:
    """Without workers the data are read; with workers one line names the key and the size."""
    script = tmp_path / "loader.py"
    script.write_text(LOADER)
    mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment())
    assert done.stdout.splitlines() == [
        "100000.0",
        f"num_workers=1: data loading processes cannot use shared memory ({REASONS[options]}); set num_workers=0, or "
        "give the container more, for example with docker run --shm-size=8g",
    ], done.stderr
