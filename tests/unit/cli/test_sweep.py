"""Failed jobs of a sweep."""

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mmdistill.cli import sweep
from mmdistill.cli.job_names import FIRST_JOB
from mmdistill.errors import InputError
from tests.unit.workflows.sweep_jobs import write_job


def _raise(error: Exception) -> None:
    raise error


def test_job_returns_its_objective_and_removes_an_old_record(tmp_path: Path) -> None:
    write_job(tmp_path, 0, [], loss=0.5)
    (tmp_path / "run_0" / "failed.json").write_text("{}")
    assert sweep.run_job(lambda: None, tmp_path / "run_0", str) == 0.5
    assert not (tmp_path / "run_0" / "failed.json").exists()


def test_finished_job_is_skipped_with_resume_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    first, again = {"seed": 1, "resume": None}, {"seed": 1, "resume": "auto"}
    sweep.run_unfinished(lambda: done.append("first"), tmp_path, first)
    sweep.run_unfinished(lambda: done.append("skipped"), tmp_path, again)
    assert f"job {tmp_path.name} is already finished, skipping it" in capsys.readouterr().err
    sweep.run_unfinished(lambda: done.append("not resumed"), tmp_path, first)
    with pytest.raises(InputError):
        sweep.run_unfinished(lambda: _raise(InputError("interrupted")), tmp_path, {**again, "seed": 2})
    sweep.run_unfinished(lambda: done.append("after a failure"), tmp_path, {**again, "seed": 2})
    sweep.run_unfinished(lambda: done.append("another config"), tmp_path, again)
    assert done == ["first", "not resumed", "after a failure", "another config"]


@pytest.mark.parametrize(("target", "first"), [("a.BasicSweeper", "0"), ("x.OptunaSweeper", "3")])
def test_sweeper_that_chooses_values_continues_after_earlier_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, first: str
) -> None:
    monkeypatch.setenv(FIRST_JOB, "")
    for number in (0, 2):
        write_job(tmp_path, number, [], loss=0.5)
    config = {"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": {"_target_": target}}}
    sweep.SweepFailureCallback().on_multirun_start(OmegaConf.create(config))
    assert os.environ[FIRST_JOB] == first


@pytest.mark.parametrize("url", ["study.db", "sqlite:////no/such/folder/s.db"])
def test_storage_that_cannot_be_opened_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setenv(FIRST_JOB, "")
    sweeper = {"_target_": "x.OptunaSweeper", "storage": url}
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": sweeper}})
    with pytest.raises(SystemExit, match="2"):
        sweep.SweepFailureCallback().on_multirun_start(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: hydra.sweeper.storage={url}: " in line
    assert line.endswith("; use a URL such as sqlite:///optuna.db")


@pytest.mark.parametrize("error", [InputError("no such file"), RuntimeError("defect")])
def test_failed_job_is_recorded_and_does_not_raise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert sweep.run_job(lambda: _raise(error), tmp_path / "job", lambda e: f"explained: {e}") is None
    record = json.loads((tmp_path / "job" / "failed.json").read_text())
    expected = isinstance(error, InputError)
    assert record["error"] == ("explained: no such file" if expected else "RuntimeError: defect")
    assert bool(record["traceback"]) is not expected
    assert f"job job failed, the sweep continues: {record['error']}" in capsys.readouterr().err


def test_failure_of_one_of_several_ranks_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="defect"):
        sweep.run_job(lambda: _raise(RuntimeError("defect")), tmp_path, str)


def test_failed_jobs_of_this_sweep_end_it_with_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mmdistill pretrain", "-m"])
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "failed.json").write_text(json.dumps({"error": "old error"}))
    os.utime(tmp_path / "old" / "failed.json", (0, 0))
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": {}}})
    callback = sweep.SweepFailureCallback()
    callback.on_multirun_start(config)
    callback.on_multirun_end(config)  # nothing has failed
    (tmp_path / "new" / "failed.json").write_text(json.dumps({"error": "new error"}))
    with pytest.raises(SystemExit) as ended:
        callback.on_multirun_end(config)
    assert ended.value.code == sweep.FAILED_EXIT_CODE
    assert capsys.readouterr().err == (
        f"mmdistill pretrain: error: 1 job of the sweep failed:\n  {tmp_path / 'new'}: new error\n"
    )


def test_failed_jobs_are_found_if_the_clock_of_the_file_server_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FIRST_JOB, "")
    sweeper = {"_target_": "x.BasicSweeper"}
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "sweeper": sweeper}})
    callback = sweep.SweepFailureCallback()
    callback.on_multirun_start(config)
    record = tmp_path / "failed.json"
    record.write_text(json.dumps({"error": "an error"}))
    os.utime(record, (record.stat().st_mtime - 3600, record.stat().st_mtime - 3600))
    with pytest.raises(SystemExit):
        callback.on_multirun_end(config)
