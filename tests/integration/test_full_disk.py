"""A disk that is full, or a quota that is used up, at any moment of a save in both trainings."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import latest_valid_checkpoint
from mmdistill.distill.callbacks import EpochCheckpoints
from mmdistill.distill.trainer import distill
from mmdistill.errors import MMDistillError
from mmdistill.pretrain.trainer import PretrainTrainer, pretrain
from tests.configs import distill_config, pretrain_config
from tests.disk_faults import failing_disk, mount_tmpfs
from tests.ranks import fork_ranks, wait_for
from tests.tiny_data import MODEL, make_tiny, overrides, write_teacher

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_MOUNT = 77
Save = Callable[[], Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_intact(folder: Path, error: MMDistillError | None) -> None:
    """There is a valid checkpoint and no remainder of the save; the error names a file of the run in one line."""
    assert latest_valid_checkpoint(folder) is not None
    assert [p.name for p in folder.iterdir() if p.name.startswith((".tmp-", ".old-", ".trash-"))] == []
    if error is not None:
        assert str(error).startswith(str(folder.parent))
        assert "\n" not in str(error)


def fail_each_call(save: Save, folder: Path) -> None:
    """Save over an existing checkpoint; in each save another call of the system fails."""
    save()
    messages, before = [], read_files(folder)
    for at in range(200):
        error = None
        with failing_disk(at, FULL[at % 3]) as fault:
            try:
                save()
            except MMDistillError as caught:
                error = caught
        assert_intact(folder, error)
        if error is not None:
            messages.append(str(error))
        if "not saved" in str(error) and fault.calls[-1] != "fsync":  # that of the folder comes after the rename
            assert read_files(folder) == before
        before = read_files(folder)
        if not fault.raised:
            break
    assert len(messages) > 10
    assert sum(" needed" in message for message in messages) >= len(messages) - 2  # not if no folder can be created


def fill_the_disk(save: Save, folder: Path) -> None:
    """Save in a small file system in memory with less and less free space."""
    size = sum(map(len, read_files(folder).values())) // 1000

    def run(_: int) -> int:
        copy = folder.with_name("copy")
        folder.rename(copy)
        folder.mkdir()
        if not mount_tmpfs(folder, 5 * size):
            return CANNOT_MOUNT
        shutil.copytree(copy, folder, dirs_exist_ok=True)
        for name in ("barrier", "all_reduce"):  # of one rank; the threads of gloo do not exist in a fork
            setattr(torch.distributed, name, lambda *_, **__: None)
        filler, failures = folder / "filler", 0
        for free in (0, 4, size // 4, size // 2, size, 2 * size):
            filler.write_bytes(b"")
            filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - 1024 * free)))
            before, error = read_files(folder), None
            try:
                save()
            except MMDistillError as caught:
                error, failures = caught, failures + 1
                assert "No space left on device" in str(error)
                assert read_files(folder) == before
            assert_intact(folder, error)
        return 0 if 3 <= failures <= 5 else 1

    (status,) = wait_for(fork_ranks(1, run))
    if status == CANNOT_MOUNT:
        pytest.skip("no file system can be mounted here")
    assert status == 0


@pytest.mark.parametrize("phase", ["pretrain", "distill"])
def test_previous_checkpoint_stays_intact(
    phase: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [*overrides(tiny), "accelerator=cpu", "batch_size=12", "trainer.epochs=2", "trainer.save_ckpt_freq=1"]
    owner: Any = PretrainTrainer if phase == "pretrain" else EpochCheckpoints
    name = "save" if phase == "pretrain" else "on_train_epoch_end"
    original = getattr(owner, name)

    def checked(self: Any, *arguments: Any) -> Any:
        if self.state.epoch == 1:
            run = self.run if phase == "pretrain" else self.training.run
            fail_each_call(lambda: original(self, *arguments), run.checkpoints)
            fill_the_disk(lambda: original(self, *arguments), run.checkpoints)
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, checked)
    if phase == "pretrain":
        pretrain(pretrain_config(*data, *MODEL, "modality=rgb"), tmp_path / "run")
    else:
        teacher = write_teacher(tmp_path / "teacher", "rgb", 0)
        distill(distill_config(*data, "trainer.teachers=[rgb]", f"trainer.ckpt_path=[{teacher}]"), tmp_path / "run")
    assert latest_valid_checkpoint(tmp_path / "run" / "checkpoints") is not None
