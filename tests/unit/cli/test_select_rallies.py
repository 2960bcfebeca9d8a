"""The command ``mmdistill select-rallies``."""

import json
from functools import partial
from pathlib import Path

import pytest

from mmdistill.cli.select_rallies import main
from mmdistill.data.annotations import load_annotations
from mmdistill.evaluation import rally_selection
from tests.tiny_data import make_tiny, overrides, write_teacher

pytestmark = pytest.mark.usefixtures("single_process_env")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A checkpoint, eight training rallies, and four of them for the evaluation."""
    root = make_tiny(tmp_path / "data", per_class=2)
    rallies = json.loads((root / "val.json").read_text())
    (root / "val.json").write_text(json.dumps(rallies[::2]))
    (tmp_path / "labeled.json").write_text(json.dumps(rallies[1:2]))
    options = [o for o in overrides(root) if not o.startswith("trainer")]
    return [str(write_teacher(tmp_path / "rgb", "rgb", seed=0)), "--output", str(tmp_path / "out"), *options]


def test_rallies_that_are_neither_labeled_nor_evaluated_are_selected(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*arguments, "--budget", "3", "--labeled", str(tmp_path / "labeled.json")]) == 0
    found = load_annotations(tmp_path / "out" / "selected.json")
    assert {rally.video for rally in found} == {"rally_DL_1", "rally_T_1", "rally_W_1"}
    assert all(rally.num_frames == 12 and not rally.events for rally in found)
    assert "3 rallies of 3 to label" in capsys.readouterr().out
    files = sorted(path.stem for path in (tmp_path / "out" / "features").glob("*.npy"))
    assert files == ["rally_CC_1", "rally_DL_1", "rally_T_1", "rally_W_1"]


def test_the_curve_uses_the_evaluation_rallies(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rally_selection, "SpottingHead", partial(rally_selection.SpottingHead, steps=10))
    assert main([*arguments, "--budget", "1", "--curve", "--draws", "2"]) == 0
    assert "2 evaluated rallies, 2 draws" in capsys.readouterr().out
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [row["rallies"] for row in curve["rows"]] == [1, 2]
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "5"], "budget=5 of 4 rallies without labels; select between 1 and 4"),
        (["data_module.fewshot_eval_json_path=unlabel.json"], "all of 8 training rallies are labeled or in"),
        (["--component", "teacher_flow"], "teacher_flow"),
    ],
)
def test_impossible_selections_are_one_line(
    arguments: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*arguments, *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
