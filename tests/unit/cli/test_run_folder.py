"""A refused command leaves its run folder as it was."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmdistill.cli.run_folder import RECORDS, RunFolder, RunFolderCallback, restore_folders


def _write(folder: Path, text: str, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


RUN = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "run.json", "run.log", "checkpoints/a")


def test_records_of_an_earlier_run_are_restored(tmp_path: Path) -> None:
    _write(tmp_path, "earlier", *RUN)
    before = _contents(tmp_path)
    folder = RunFolder(tmp_path, RECORDS)
    _write(tmp_path, "refused", *RUN[:4], "failed.json")
    folder.restore()
    assert _contents(tmp_path) == before


def test_records_of_a_run_that_has_started_are_kept(tmp_path: Path) -> None:
    _write(tmp_path, "earlier", *RUN[:4])
    folder = RunFolder(tmp_path, RECORDS)
    _write(tmp_path, "new", *RUN)
    folder.restore()
    assert set(_contents(tmp_path).values()) == {"new"}


def test_log_of_the_job_that_holds_the_lock_does_not_count(tmp_path: Path) -> None:
    _write(tmp_path, "earlier", *RUN[:4], "checkpoints/.lock")
    folder = RunFolder(tmp_path, RECORDS)
    _write(tmp_path, "refused", *RUN[:4])
    _write(tmp_path, "of the other job", "run.log")
    folder.restore()
    assert (tmp_path / "run.json").read_text() == "earlier"


@pytest.mark.parametrize(("own", "removed"), [(True, True), (False, False)])
def test_new_folder_is_removed_if_only_records_are_in_it(tmp_path: Path, own: bool, removed: bool) -> None:
    run_dir = tmp_path / "date" / "time" / "run"
    folder = RunFolder(run_dir, RECORDS)
    _write(run_dir, "refused", *RUN[:4])
    (run_dir / "checkpoints").mkdir()
    if not own:
        _write(run_dir, "", "notes.txt")
    folder.restore()
    assert (tmp_path / "date").exists() is not removed
    assert tmp_path.exists()


@pytest.mark.parametrize("refused", [True, False])
def test_jobs_of_a_sweep_that_did_not_start_are_restored(tmp_path: Path, refused: bool) -> None:
    _write(tmp_path / "job_0", "earlier", *RUN, "x.log")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "job": {"name": "x"}}})
    RunFolderCallback().on_multirun_start(config)
    _write(tmp_path, "refused", "multirun.yaml")
    _write(tmp_path / "job_0", "refused", *RUN[:4], "failed.json", "x.log")
    restore_folders(refused=refused)
    assert set(_contents(tmp_path / "job_0").values()) == {"earlier"}
    assert (tmp_path / "multirun.yaml").exists() is not refused


def test_folder_without_a_value_is_left_to_hydra() -> None:
    config = OmegaConf.create({"modality": "???", "hydra": {"run": {"dir": "${modality}"}, "job": {"name": "x"}}})
    RunFolderCallback().on_run_start(config)
    restore_folders(refused=True)
