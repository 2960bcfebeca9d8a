"""Both trainings on mounted drives: start, lock, save, resume; what cannot be guaranteed is logged once."""

import errno
from collections import Counter
from pathlib import Path

import pytest

from mmdistill.checkpoint import latest_valid_checkpoint
from mmdistill.checkpoint.read import read_checkpoint
from mmdistill.distill.trainer import distill
from mmdistill.pretrain.trainer import pretrain
from tests.configs import distill_config, pretrain_config
from tests.disk_faults import mounted_drive
from tests.tiny_data import MODEL, make_tiny, overrides, write_teacher


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1)
    return [*overrides(root), "accelerator=cpu", "batch_size=12", "trainer.save_ckpt_freq=1"]


@pytest.mark.usefixtures("new_command")
@pytest.mark.parametrize(
    ("phase", "link_error"), [("pretrain", errno.EPERM), ("distill", errno.ENOSYS), ("distill", errno.ENOTSUP)]
)
def test_run_on_a_mounted_drive(
    data: list[str], phase: str, link_error: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_teacher(tmp_path / "teacher", "rgb", 0)
    run = tmp_path / "run"

    def train(epochs: int) -> None:
        own = [*data, f"trainer.epochs={epochs}", "resume=auto", "trainer.keep_last=1"]
        if phase == "pretrain":
            pretrain(pretrain_config(*own, *MODEL, "modality=rgb"), run)
        else:
            distill(distill_config(*own, "trainer.teachers=[rgb]", f"trainer.ckpt_path=[{teacher}]"), run)

    data_dir = Path(next(o for o in data if "target_data_dir" in o).partition("=")[2])
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    with mounted_drive(link_error):
        train(2)
        train(3)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before  # it may be read-only
    newest = latest_valid_checkpoint(run / "checkpoints")
    assert newest is not None
    assert read_checkpoint(newest).meta["epoch"] == 2
    assert "resumed from" in (run / "run.log").read_text()
    hidden = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    assert hidden == []  # no remainder of a save or of a removed checkpoint, and the lock is released
    limits = Counter(record.getMessage() for record in caplog.records)
    expected = ["cannot sync folders", "does not rename over an existing file"]
    expected.append("does not rename folders" if phase == "pretrain" else "has no hard links")
    for text in expected:
        counts = [count for message, count in limits.items() if text in message]
        assert counts, text
        assert max(counts) <= 2, text  # once per start
