"""``mmdistill demo``."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmdistill.cli import demo
from mmdistill.data.annotations import load_annotations
from mmdistill.workflows import pipeline
from tests.tiny_data import make_tiny
from tests.unit.workflows.test_results_table import make_results


def _stages_that_write(results: dict[str, Any], received: list[pipeline.Stage]) -> Any:
    def run(stages: list[pipeline.Stage], *, parallel: int = 1) -> None:
        assert parallel == 2
        received.extend(stages)
        stages[-1].run_dir.mkdir(parents=True)
        (stages[-1].run_dir / "fewshot.json").write_text(json.dumps(results))

    return run


@pytest.mark.parametrize(("low", "verdict"), [(0.1, ": confirmed in"), (-0.1, ": NOT confirmed in")])
def test_final_lines_state_the_result_and_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], low: float, verdict: str
) -> None:
    stages: list[pipeline.Stage] = []
    flow = {"variance": 0.001, "is_constant": False, "gradient_share": 0.25, "r2": 0.5, "r2_by_class": {}}
    about = {"epoch": 11, "train_clips": 32, "held_out_clips": 128, "held_out": "val.json", "problems": {}}
    results = {**make_results(70, 60, 25, low=low), "ledger": {**about, "teachers": {"flow": flow}}}
    monkeypatch.setattr(pipeline, "run_stages", _stages_that_write(results, stages))
    monkeypatch.setattr(demo, "available_cores", lambda: 2)
    monkeypatch.setattr(demo, "label_rally", lambda output: 0 if output == tmp_path else 1)
    assert demo.main(["--output", str(tmp_path), "--short"]) == 0
    out = capsys.readouterr().out
    assert verdict in out
    assert "\n  flow: variance 0.001, gradient 25.0 %, R2 0.500\n" in out
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
    def fail(stages: list[pipeline.Stage], *, parallel: int) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run_stages", fail)
    assert demo.main(["--output", str(tmp_path)]) == status
    assert message in capsys.readouterr().err


def test_one_rally_is_labeled_with_the_next_ones_as_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = make_tiny(tmp_path / "data", per_class=3)  # 12 rallies
    (root / "frames").rename(root / "vid_frames_224")
    load = demo.load_config
    more = [f"data_module.target_data_dir={root}", "data_module.label_fields=[type,direction]"]
    monkeypatch.setattr(demo, "load_config", lambda schema, name, overrides: load(schema, name, [*overrides, *more]))
    received: list[str] = []
    monkeypatch.setattr(demo.label, "main", lambda arguments: received.extend(arguments) or 0)
    assert demo.label_rally(tmp_path / "out") == 0
    examples = load_annotations(tmp_path / "out" / "label" / "examples.json")
    assert received[0] == str(root / "vid_frames_224" / "rally_CC_0")
    assert received[2] == str(tmp_path / "out" / "mmdistill" / "checkpoints" / "last.ckpt")
    assert len(examples) == 10
    assert "rally_CC_0" not in [rally.video for rally in examples]
    assert examples[0].events[0].label == "stroke_CC"
