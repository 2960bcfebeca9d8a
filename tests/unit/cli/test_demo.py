"""``mmdistill demo``."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmdistill.cli import demo
from mmdistill.workflows import pipeline
from tests.unit.workflows.test_results_table import make_results


def _stages_that_write(results: dict[str, Any], received: list[pipeline.Stage]) -> Any:
    def run(stages: list[pipeline.Stage]) -> None:
        received.extend(stages)
        stages[-1].run_dir.mkdir(parents=True)
        (stages[-1].run_dir / "fewshot.json").write_text(json.dumps(results))

    return run


@pytest.mark.parametrize(("low", "verdict"), [(0.1, ": confirmed in"), (-0.1, ": NOT confirmed in")])
def test_final_lines_state_the_result_and_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], low: float, verdict: str
) -> None:
    stages: list[pipeline.Stage] = []
    monkeypatch.setattr(pipeline, "run_stages", _stages_that_write(make_results(70, 60, 25, low=low), stages))
    assert demo.main(["--output", str(tmp_path), "--short"]) == 0
    out = capsys.readouterr().out
    assert verdict in out
    assert "One epoch per stage is too short to learn" in out
    assert f"report: {tmp_path / 'test' / 'report.html'}\n" in out
    assert "trainer.epochs=1" in stages[0].overrides
    assert [stage.verb for stage in stages] == ["pretrain"] * 3 + ["distill"] * 2


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (pipeline.StageError("rgb failed"), 1, "mmdistill demo: error: rgb failed"),
        (KeyboardInterrupt(), 130, "mmdistill demo: interrupted"),
    ],
)
def test_failure_has_a_status_and_a_message(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def fail(stages: list[pipeline.Stage]) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run_stages", fail)
    assert demo.main(["--output", str(tmp_path)]) == status
    assert message in capsys.readouterr().err
