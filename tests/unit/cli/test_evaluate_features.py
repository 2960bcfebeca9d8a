import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmdistill.cli.evaluate_features import main, make_names_distinct, name_options
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
        (["--n-way", 7], "; use --n-way 6\n"),
        (["--q-sample", 30], "; lower --k-shot or --q-sample\n"),
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


def test_messages_name_the_options_of_the_command():
    """In place of the keys of `evaluate`; keys without an option are omitted."""
    assert name_options("use data_module.n_way=2 or lower k_shot or q_sample, or merge labels (label_fields)") == (
        "use --n-way 2 or lower --k-shot or --q-sample"
    )
    assert name_options("lower q_sample or k_shot, or unset disjoint") == (
        "lower --q-sample or --k-shot, or omit --disjoint"
    )
    assert name_options("which have none (set data_module.eval_clips=events or data_module.label=video)") == (
        "which have none"
    )


@pytest.mark.parametrize("name", ["w.safetensors", "last.ckpt", "folder.npz"])
def test_a_checkpoint_is_not_a_feature_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    if name == "folder.npz":
        (tmp_path / name).mkdir()
    else:
        save_file({"encoder.patch_embed.proj.weight": np.zeros((2, 3))}, tmp_path / name)
    assert run(tmp_path / name) == 2
    assert "`mmdistill features` writes the features of a checkpoint to a file" in capsys.readouterr().err


def test_features_of_the_same_network_are_named_by_their_files():
    first, other = make_features("student_rgb", 1.0), make_features("random", 1.0)
    named = make_names_distinct([first, other, first], [Path("a.npz"), Path("b.npz"), Path("c.npz")])
    assert [f.network for f in named] == ["student_rgb (a)", "random", "student_rgb (c)"]


def test_disjoint_players_the_card_and_the_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Features of a file with one-hot players: the score with disjoint players is at chance."""
    players = 2 * LABELS + np.arange(len(LABELS)) % 2
    arrays = {"features": np.eye(12)[players], "labels": LABELS, "groups": np.arange(len(LABELS))}
    labels = [f"near_ad_stroke_fh_gs_{label}_-_in" for label in LABELS]
    np.savez(tmp_path / "f.npz", **arrays, players=players.astype(str), event_labels=labels)
    sizes = [
        "--k-shot",
        5,
        "--q-sample",
        5,
        "--episodes",
        30,
        "--classifier",
        "centroid",
        "--json",
        tmp_path / "r.json",
    ]
    assert run(tmp_path / "f.npz", *sizes, "--disjoint", "player", "--report-card", "--shortcut-audit") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["top1_action_ensemble"] == pytest.approx(0.2, abs=0.01)
    assert found["shortcut_audit"]["levels"]["video"]["f"]["top1_action_ensemble"] > 0.9
    assert found["report_card"]["direction"]["networks"]["f"]["n_way"] == 5
    assert "explain +" in capsys.readouterr().out
    np.savez(tmp_path / "g.npz", **arrays)
    for option, message in (
        (["--disjoint", "player"], "--disjoint player: the features have no players; write them again"),
        (["--report-card"], "the report card needs clips of labeled events, and no clip has a label"),
    ):
        assert run(tmp_path / "g.npz", *sizes, *option) == 2
        assert message in capsys.readouterr().err
