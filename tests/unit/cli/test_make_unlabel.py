"""The command ``make-unlabel``: rallies without labels, without those of excluded files."""

import json
from pathlib import Path

import pytest

from mmdistill.cli.make_unlabel import main
from mmdistill.data.annotations.base import Event, Player, Rally
from mmdistill.data.annotations.f3set import load_f3set, to_json

PLAYERS = (Player("Ana B", "LH"), Player("Eva D", "RH"))
RALLIES = [
    Rally(name, 10, 25.0, (Event(3, "near_deuce_serve_-_-_T_-_in"),), *PLAYERS) for name in ("m_1_10", "m_20_30")
]
OTHERS = [Rally("m_50_60", 10, 25.0, ()), Rally("other_1_2", 10, 25.0, ())]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    """Two annotation files and the path of the output."""
    for name, rallies in (("a", RALLIES), ("b", OTHERS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(to_json(rallies)))
    return str(tmp_path / "a.json"), str(tmp_path / "b.json"), str(tmp_path / "new" / "unlabel.json")


def test_rallies_are_merged_without_labels(files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = files
    assert main([a, b, "--output", out]) == 0  # creates the folder
    rallies = load_f3set(out)
    assert len(rallies) == 4
    assert all(rally.events == () for rally in rallies)
    assert [(r.near, r.far) for r in rallies] == [PLAYERS, PLAYERS, (Player(), Player()), (Player(), Player())]
    assert "serve" not in Path(out).read_text()
    assert f"{out}: 4 rallies, 0 excluded" in capsys.readouterr().out


def test_matches_of_other_files_are_excluded(files: tuple[str, str, str]) -> None:
    a, b, out = files
    assert main([b, "--output", out, "--exclude", a]) == 0
    assert [r.video for r in load_f3set(out)] == ["m_50_60", "other_1_2"]
    assert main([b, "--output", out, "--exclude", a, "--by", "match"]) == 0
    assert [r.video for r in load_f3set(out)] == ["other_1_2"]


def test_duplicate_rallies_and_empty_results_exit_with_2(
    files: tuple[str, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    a, _, out = files
    assert main([a, a, "--output", out]) == 2
    assert "m_1_10 is in more than one of the files" in capsys.readouterr().err
    assert main([a, "--output", out, "--exclude", a]) == 2
    assert "--exclude removes all rallies" in capsys.readouterr().err
    assert not Path(out).exists()
