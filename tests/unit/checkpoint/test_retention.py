import os
import shutil
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import (
    CheckpointError,
    latest_valid_checkpoint,
    prune,
    read_checkpoint,
    retention,
    save_torch,
)
from mmdistill.checkpoint.convert import write_deepspeed


def write_native(folder: Path, step: int, loss: float | None) -> Path:
    path = folder / f"epoch={step:02d}-loss={loss}"
    write_deepspeed(
        {"encoder.norm.weight": torch.full((2,), float(step))}, path, {"step": step, "epoch": step, "loss": loss}
    )
    return path


def epochs_in(folder: Path) -> list[int]:
    return sorted(int(p.name[6:8]) for p in folder.iterdir() if p.name.startswith("epoch="))


def test_prune_keeps_newest_best_and_protected(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 6.0, float("nan")]
    paths = [write_native(tmp_path, step, loss) for step, loss in enumerate(losses)]
    removed = prune(tmp_path, keep_last=2, save_top_k=2, protect=[paths[0]])
    assert epochs_in(tmp_path) == [0, 1, 4, 5, 6]
    assert sorted(removed) == [paths[2], paths[3]]
    assert prune(tmp_path, keep_last=None, save_top_k=None) == []
    prune(tmp_path, keep_last=0, save_top_k=0, protect=[paths[0] / "checkpoint" / "mp_rank_00_model_states.pt"])
    assert epochs_in(tmp_path) == [0, 1, 6]  # the newest, the best (NaN is never the best), the protected one
    assert prune(tmp_path, keep_last=1, save_top_k=-1) == []


def write_lightning(folder: Path, step: int, loss: float | None, name: str = "") -> Path:
    path = folder / (name or f"epoch={step:02d}-train_loss={loss}.ckpt")
    meta = {"kind": "distill", "step": step, "epoch": step, "loss": loss}
    content = {"state_dict": {"a": torch.full((3,), 1.5)}, "global_step": step, "pytorch-lightning_version": "2"}
    save_torch({**content, "mmdistill": meta}, path)
    return path


def test_prune_of_lightning_files_counts_external_losses(tmp_path: Path) -> None:
    """``last.ckpt`` and files with other names are kept."""
    old = tmp_path / "old"
    best = write_lightning(old, 0, 0.1)
    folder = tmp_path / "new"
    paths = [write_lightning(folder, step, loss) for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.6))]
    write_lightning(folder, 4, None, "last.ckpt")
    write_lightning(folder, 0, 0.9, "mine.ckpt")
    external = {str(p): loss for p, loss in ((best, 0.1), (old / "gone.ckpt", 0.0), (paths[0], 0.5))}
    assert prune(folder, keep_last=1, save_top_k=2, external_losses=external) == [paths[2], paths[0]]
    assert epochs_in(folder) == [2, 4]
    assert prune(folder, keep_last=None, save_top_k=1, external_losses=external) == [paths[1]]
    assert sorted(p.name for p in folder.iterdir()) == ["epoch=04-train_loss=0.6.ckpt", "last.ckpt", "mine.ckpt"]
    assert best.exists()
    assert retention.best_checkpoint(external) == best
    assert retention.best_checkpoint({str(old / "gone.ckpt"): 0.0, str(best): float("nan")}) is None


def test_prune_removes_nothing_if_the_newest_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_lightning(tmp_path, step, 0.5) for step in range(3)]
    flipped = bytearray(paths[2].read_bytes())
    flipped[flipped.index(b"\0\0\xc0\x3f" * 3) + 4] ^= 1  # in its only tensor
    paths[2].write_bytes(bytes(flipped))
    assert prune(tmp_path, keep_last=1, save_top_k=1) == []
    assert "damaged" in caplog.text


def test_interrupted_epoch_is_never_the_best(tmp_path: Path) -> None:
    part = write_native(tmp_path, 1, 0.1)
    part = part.rename(tmp_path / "epoch=01-loss=0.1-step=7")
    write_native(tmp_path, 2, 0.5)
    assert prune(tmp_path, keep_last=1, save_top_k=1) == [part]


def test_link_or_copy_replaces_an_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(2):
        path, last = write_lightning(tmp_path, step, 0.5), tmp_path / "last.ckpt"
        retention.link_or_copy(path, last)
        assert last.samefile(path)
    path.unlink()
    assert last.stat().st_size > 0

    def raise_os_error(*_: object) -> None:
        raise OSError(1, "Operation not permitted")  # as on FAT and some network disks

    monkeypatch.setattr(retention.os, "link", raise_os_error)
    path = write_lightning(tmp_path, 3, 0.4)
    retention.link_or_copy(path, last)
    assert last.read_bytes() == path.read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_find_resume_rejects_folders_with_later_checkpoints(tmp_path: Path) -> None:
    assert retention.find_resume(None, tmp_path / "none") is None
    assert retention.find_resume("auto", tmp_path / "none") is None
    first, second = write_lightning(tmp_path, 1, 0.5), write_lightning(tmp_path, 2, 0.4)
    with pytest.MonkeyPatch.context() as other:
        other.setattr(retention, "get_rank", lambda: 1)
        other.setattr(retention, "latest_valid_checkpoint", lambda _: pytest.fail("only rank 0 searches"))
        assert retention.find_resume("auto", tmp_path) is None  # the result of rank 0 is broadcast
    with pytest.raises(CheckpointError, match=r"contains checkpoints of an earlier run .*resume=auto"):
        retention.find_resume(None, tmp_path)
    assert retention.find_resume("auto", tmp_path) == second
    assert retention.find_resume(str(second), tmp_path) == second
    with pytest.raises(CheckpointError, match=r"epoch=02.* of step 2, later than resume=.*epoch=01.*step 1"):
        retention.find_resume(str(first), tmp_path)
    with pytest.raises(CheckpointError, match=r"^resume: .*typo\.ckpt: does not exist"):
        retention.find_resume(str(tmp_path / "typo.ckpt"), tmp_path)
    with pytest.raises(CheckpointError, match=r"^resume=Auto: there is no such path; did you mean auto\?$"):
        retention.find_resume("Auto", tmp_path)


def test_prune_keeps_files_of_other_programs(tmp_path: Path) -> None:
    for step in range(3):
        write_native(tmp_path, step, 1.0 - step / 10)
    (tmp_path / "epoch=00-loss=1.0" / "manifest.json").unlink()  # like those of stock DeepSpeed
    (tmp_path / "notes").mkdir()
    (tmp_path / ".tmp-epoch=03").mkdir()
    (tmp_path / ".trash-x").mkdir()
    (tmp_path / "best.ckpt").write_bytes(b"x")
    prune(tmp_path, keep_last=1, save_top_k=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.ckpt",
        "epoch=00-loss=1.0",
        "epoch=02-loss=0.8",
        "notes",
    ]


def test_previous_checkpoint_is_kept_and_found_if_the_newest_is_damaged(tmp_path: Path) -> None:
    old, new = write_native(tmp_path, 1, 0.5), write_native(tmp_path, 2, 0.4)
    model = new / "checkpoint" / "mp_rank_00_model_states.pt"
    model.write_bytes(model.read_bytes()[:-1])
    assert prune(tmp_path, keep_last=1, save_top_k=1) == []
    assert latest_valid_checkpoint(tmp_path) == old


def test_failure_to_delete_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(3):
        write_native(tmp_path, step, 1.0)
    real = os.rename

    def raise_os_error(source: Path, target: Path) -> None:
        if "epoch=01-loss=1.0" in str(source):  # the folder and its files
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(retention.os, "rename", raise_os_error)
    prune(tmp_path, keep_last=1, save_top_k=0)
    assert "could not be removed" in caplog.text
    assert 2 in epochs_in(tmp_path)


def test_interrupted_save_over_a_checkpoint_is_repaired(tmp_path: Path) -> None:
    path = write_native(tmp_path, 1, 0.5)
    kept = tmp_path / f".old-{path.name}"
    path.rename(kept)  # killed between the two renames
    assert read_checkpoint(path).meta["step"] == 1
    assert latest_valid_checkpoint(tmp_path) == path
    shutil.copytree(path, kept)  # killed before the old one was deleted
    assert latest_valid_checkpoint(tmp_path) == path
    assert not kept.exists()


def test_latest_valid_checkpoint_has_the_highest_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_valid_checkpoint(tmp_path / "none") is None
    assert latest_valid_checkpoint(tmp_path) is None
    for step, name in ((30, "epoch=02-train_loss=0.1.ckpt"), (20, "last.ckpt")):
        content = {"state_dict": {"a": torch.zeros(3)}, "global_step": step, "pytorch-lightning_version": "2"}
        save_torch(content, tmp_path / name)
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "epoch=02-train_loss=0.1.ckpt"
    (tmp_path / "epoch=02-train_loss=0.1.ckpt").write_bytes(b"")
    assert latest_valid_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    assert "epoch=02-train_loss=0.1.ckpt: truncated" in caplog.text
