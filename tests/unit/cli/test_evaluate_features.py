import json
from pathlib import Path

import numpy as np
import pytest

from mmdistill.cli.evaluate_features import main, make_names_distinct
from tests.synthetic_features import make_features

LABELS = np.repeat(np.arange(6), 20)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_features_of_another_model_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    x = np.eye(6)[LABELS]
    np.savez(tmp_path / "perfect.npz", features=x, labels=LABELS, groups=np.arange(120) // 2)
    np.savez(tmp_path / "noise.npz", features=np.random.default_rng(0).normal(size=x.shape), labels=LABELS)
    out = tmp_path / "new" / "out.json"
    sizes = ["--k-shot", 1, 2, "--q-sample", 5, "--episodes", 30, "--disjoint", "video"]
    options = ["--classifier", "centroid", "logistic", "--workers", 1, "--json", out, "--report", tmp_path / "report"]
    assert run(tmp_path / "perfect.npz", tmp_path / "noise.npz", *sizes, *options) == 0
    found = json.loads(out.read_text())
    assert found["top1_action_ensemble"] == 1.0
    assert found["network"] == "perfect"
    assert len(found["settings"]) == 4
    assert found["settings"][0]["differences"]["perfect - noise"]["low"] > 0.5
    captured = capsys.readouterr()
    assert "6 eligible classes" in captured.err
    assert "100.00 ± 0.00" in captured.out
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-way", 7], "need 7 classes"),
        (["--classifier", "svm"], "classifier 'svm' is not one of logistic"),
        (["--probe"], "f.npz: no array `groups`, which --disjoint and --probe need"),
    ],
)
def test_invalid_options_exit_with_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], message: str
):
    np.savez(tmp_path / "f.npz", features=np.eye(6)[LABELS], labels=LABELS)
    assert run(tmp_path / "f.npz", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmdistill evaluate-features: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_features_of_the_same_network_are_named_by_their_files():
    first, other = make_features("student_rgb", 1.0), make_features("random", 1.0)
    named = make_names_distinct([first, other, first], [Path("a.npz"), Path("b.npz"), Path("c.npz")])
    assert [f.network for f in named] == ["student_rgb (a)", "random", "student_rgb (c)"]
