"""The command ``split-data``: one annotation file per split."""

import json
from pathlib import Path

import pytest

from mmdistill.cli.split_data import main
from mmdistill.data.annotations.base import Event, Player, Rally
from mmdistill.data.annotations.f3set import load_f3set, to_json


@pytest.fixture
def annotations(tmp_path: Path) -> str:
    """Ten matches of four rallies, each with three types of strokes."""
    events = tuple(
        Event(5 * i, f"near_ad_{kind}_fh_gs_CC_-_in") for i, kind in enumerate(("serve", "return", "stroke"))
    )
    players = (Player("Ana B", "LH"), Player("Eva D", "RH"))
    names = [f"match{m}_{100 * r}_{100 * r + 50}" for m in range(10) for r in range(4)]
    rallies = [Rally(name, 51, 25.0, events, *players) for name in names]
    (tmp_path / "all.json").write_text(json.dumps(to_json(rallies)))
    return str(tmp_path / "all.json")


def test_one_file_per_split_is_written(annotations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [annotations, "--output", str(tmp_path / "s"), "--by", "match"]
    assert main([*given, "--fractions", "train=0.8", "val=0.2"]) == 0
    assert len(load_f3set(tmp_path / "s/train.json")) == 32
    assert {r.near for r in load_f3set(tmp_path / "s/train.json")} == {Player("Ana B", "LH")}
    assert len(load_f3set(tmp_path / "s/val.json")) == 8
    assert f"{tmp_path / 's/train.json'}: 32 rallies, 96 events, 3 labels" in capsys.readouterr().out


def test_classes_are_split_by_the_given_fields(annotations: str, tmp_path: Path) -> None:
    given = [annotations, "--output-dir", str(tmp_path), "--by", "class", "--label-fields", "type"]
    assert main([*given, "--fractions", "base=0.6", "novel=0.4"]) == 0
    types = [
        {e.label.split("_")[2] for r in load_f3set(tmp_path / f"{n}.json") for e in r.events} for n in ("base", "novel")
    ]
    assert {r.far.hand for r in load_f3set(tmp_path / "novel.json")} == {"RH"}
    assert types[0] | types[1] == {"serve", "return", "stroke"}
    assert not types[0] & types[1]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [(["train", "val=0.2"], "--fractions train: expected"), (["a=0.5", "a=0.5"], "a name occurs twice")],
)
def test_wrong_fractions_exit_with_2(
    annotations: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fractions: list[str], message: str
) -> None:
    assert main([annotations, "--output-dir", str(tmp_path), "--by", "match", "--fractions", *fractions]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_split_together_have_the_same_classes(annotations: str, tmp_path: Path) -> None:
    """The second file lacks a class, so alone it would be split differently."""
    rallies = [Rally("x_0_50", 51, 25.0, tuple(Event(i, f"near_ad_{kind}_fh_gs_CC_-_in") for i, kind in
                     enumerate(("serve", "stroke"))))]  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(to_json(rallies)))
    given = [annotations, str(tmp_path / "val.json"), "--output", str(tmp_path / "s"), "--by", "class"]
    assert main([*given, "--fractions", "base=0.6", "novel=0.4", "--label-fields", "type"]) == 0
    names = ("all_base", "all_novel", "val_base", "val_novel")
    parts = {name: json.loads((tmp_path / "s" / f"{name}.json").read_text()) for name in names}
    types = {name: {e["label"].split("_")[2] for r in part for e in r["events"]} for name, part in parts.items()}
    assert types["all_base"] | types["all_novel"] == {"serve", "return", "stroke"}
    assert types["val_base"] | types["val_novel"] == {"serve", "stroke"}
    assert not types["val_novel"] & types["all_base"]
    assert main([*given[:-1], "match", "--fractions", "base=0.6", "novel=0.4"]) == 2
