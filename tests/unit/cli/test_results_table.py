"""``mmdistill results-table``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmdistill.cli import results_table
from mmdistill.workflows import pipeline
from tests.unit.workflows.test_results_table import make_results


def _fake_run(received: list[pipeline.Stage]) -> Callable[..., None]:
    """In place of `run_stages`: keep the stages, and write results in which the student is best."""

    def run(stages: list[pipeline.Stage], *, parallel: int) -> None:
        received.extend(stages)
        for stage in (s for s in stages if s.run_dir.name == "test"):
            stage.run_dir.mkdir(parents=True)
            (stage.run_dir / "fewshot.json").write_text(json.dumps(make_results(70, 60, 25, low=0.1)))

    return run


def test_table_and_result_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[pipeline.Stage] = []
    monkeypatch.setattr(pipeline, "run_stages", _fake_run(stages))
    assert results_table.main(["--output", str(tmp_path), "batch_size=4", "--seeds", "0", "1"]) == 0
    assert len({stage.name for stage in stages}) == len(stages) == 16
    assert {stage.run_dir.parent.name for stage in stages} == {"seed0", "seed1"}
    assert all("batch_size=4" in stage.overrides for stage in stages)
    assert ": confirmed for seeds [0, 1].\n" in capsys.readouterr().out
    assert "| | seed 0 | seed 1 |" in (tmp_path / "results.md").read_text()
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["student_beats_baselines"] is True
    assert [(r["nuisance"], r["seed"]) for r in content["results"]] == [(None, 0), (None, 1)]
    assert not (tmp_path / "results.png").exists()


def test_each_nuisance_has_its_own_data_and_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages: list[pipeline.Stage] = []
    monkeypatch.setattr(pipeline, "run_stages", _fake_run(stages))
    assert results_table.main(["--output", str(tmp_path), "--seeds", "3", "--nuisance", "0.3", "1"]) == 0
    assert len({stage.name for stage in stages}) == len({stage.run_dir for stage in stages}) == 8 + 5
    for stage in stages:
        folder = stage.run_dir.parents[1]
        assert f"data_module.target_data_dir={folder / 'data'}" in stage.overrides
        assert f"data_module.demo_nuisance={ {'nuisance_0.3': 0.3, 'nuisance_1': 1.0}[folder.name] }" in stage.overrides
    text = (tmp_path / "results.md").read_text()
    assert text.index("## Nuisance 0.3\n") < text.index("## Nuisance 1\n")
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(r["nuisance"], r["seed"]) for r in results] == [(0.3, 3), (1.0, 3)]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


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
