import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmdistill.checkpoint.locate
from mmdistill.checkpoint import detect_format
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.names import rank_files
from mmdistill.checkpoint.locate import existing_path, locate, read_json
from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory of stock DeepSpeed."""
    return Path(shutil.copytree(FIXTURES / "zero1-w1-fp32" / NAME, tmp_path / NAME))


def test_each_level_of_a_directory_has_the_same_location(root: Path) -> None:
    for path in (root, root / "latest", root / "checkpoint", *(root / "checkpoint").iterdir()):
        assert locate(path) == (root, root / "checkpoint")


def test_files_are_ordered_by_rank_also_with_glob_characters(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*"
    folder.mkdir()
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(12)]
    for name in names:
        (folder / name).touch()
    assert [path.name for path in rank_files(folder, "_optim_states.pt")] == names


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty and should name"), (b"global_step9", "names 'global_step9'"), (b"\xff\xfe", "unreadable")],
)
def test_invalid_latest_is_an_error_that_names_the_tag(root: Path, content: bytes, message: str) -> None:
    (root / "latest").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=rf"latest: .*{message}.*there is 'checkpoint'"):
        locate(root)
    assert locate(root / "checkpoint")[1] == root / "checkpoint"  # what the message proposes
    (root / "latest").unlink()
    assert locate(root)[1] == root / "checkpoint"  # the only tag


def test_manifest_without_tag_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="has a manifest but no tag directory"):
        locate(tmp_path)


def test_folders_and_other_files_are_errors(tmp_path: Path, root: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: contains one checkpoint; give its path:\n  {root}$"):
        locate(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"contains 2 checkpoints; give one of these, newest first:\n"):
        locate(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in this directory"):
        locate(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello world")
    with pytest.raises(CheckpointError, match=r"notes\.txt: not a known checkpoint format"):
        detect_format(tmp_path / "notes.txt")


def test_checkpoints_of_a_run_folder_are_listed_newest_first(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    names = ["epoch=02-train_loss=0.2.ckpt", "epoch=10-train_loss=0.1.ckpt", "epoch=09-train_loss=0.1.ckpt"]
    for seconds, name in enumerate(names):
        (folder / name).touch()
        os.utime(folder / name, (seconds, seconds))
    os.link(folder / names[-1], folder / "last.ckpt")
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path)
    listed = str(caught.value).splitlines()[1:]
    assert listed == [f"  {folder / name}" for name in ("last.ckpt", *reversed(names))]


def test_missing_path_lists_the_closest_folder(tmp_path: Path) -> None:
    (tmp_path / "epoch=01").mkdir()
    with pytest.raises(CheckpointError, match=rf"absent/x\.ckpt: does not exist; {tmp_path} contains 'epoch=01'"):
        existing_path(tmp_path / "absent" / "x.ckpt")


def test_missing_path_does_not_list_the_folder_of_this_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra has made it before the paths are checked."""
    run_dir = tmp_path / "output/2026-01-01/run"
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / "run.json").touch()
    runtime = SimpleNamespace(output_dir=str(run_dir))
    holder = SimpleNamespace(initialized=lambda: True, get=lambda: SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(mmdistill.checkpoint.locate, "HydraConfig", holder)
    with pytest.raises(CheckpointError, match=f"does not exist; {tmp_path} contains nothing"):
        existing_path(tmp_path / "x.ckpt")
    (tmp_path / "output/other").touch()
    with pytest.raises(CheckpointError, match=f"does not exist; {tmp_path} contains 'output'"):
        existing_path(tmp_path / "x.ckpt")


def test_previous_checkpoint_of_an_interrupted_save_is_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    root.rename(root.with_name(f".old-{NAME}"))
    assert existing_path(root).name == f".old-{NAME}"
    assert "the save that replaces it was interrupted; using the previous checkpoint" in caplog.text


def test_invalid_json_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    for text, message in (("{", "unreadable"), ("[]", "is not a JSON object")):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(CorruptCheckpointError, match=rf"meta\.json: {message}"):
            read_json(tmp_path / "meta.json")


def test_a_name_that_is_too_long_is_one_error() -> None:
    with pytest.raises(CheckpointError, match=r"nnn: File name too long; give the path of a checkpoint"):
        existing_path("n" * 300)
