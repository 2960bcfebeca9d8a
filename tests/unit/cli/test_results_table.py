"""``mmdistill results-table``."""

import json
from pathlib import Path

import pytest

from mmdistill.cli import results_table
from mmdistill.workflows import pipeline
from tests.unit.workflows.test_results_table import make_results


def test_table_and_result_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(stages: list[pipeline.Stage], *, parallel: int) -> None:
        assert len({stage.name for stage in stages}) == len(stages) == 12
        assert {stage.run_dir.parent.name for stage in stages} == {"seed0", "seed1"}
        assert all("batch_size=4" in stage.overrides for stage in stages)
        for stage in (s for s in stages if s.run_dir.name == "test"):
            stage.run_dir.mkdir(parents=True)
            (stage.run_dir / "fewshot.json").write_text(json.dumps(make_results(70, 60, 25, low=0.1)))

    monkeypatch.setattr(pipeline, "run_stages", run)
    assert results_table.main(["--output", str(tmp_path), "batch_size=4", "--seeds", "0", "1"]) == 0
    assert ": confirmed for seeds [0, 1] (" in capsys.readouterr().out
    assert "| | seed 0 | seed 1 |" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["student_beats_baselines"] is True


def test_failed_stage_gives_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(stages: list[pipeline.Stage], *, parallel: int) -> None:
        raise pipeline.StageError("rgb failed")

    monkeypatch.setattr(pipeline, "run_stages", fail)
    assert results_table.main(["--output", str(tmp_path)]) == 1
    assert "mmdistill results-table: error: rgb failed" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["nope.json", "trainer.epcohs=1", "n_way=3"])
def test_wrong_override_ends_the_command_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert results_table.main(["--output", str(tmp_path / "claim"), override]) == 2
    assert override.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "claim").exists()
