"""Splits share no match, or no class. The same seed gives the same split."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.annotations.f3set import load_f3set, match_name
from mmdistill.data.annotations.splits import split_by_class, split_by_match
from tests.generated_annotations import make_f3set_entries

ROOT = Path(__file__).resolve().parents[4]
REAL = ROOT.parent / "shared" / "data" / "f3set-tennis" / "val.json"
KINDS = ("serve", "return", "stroke")


def label(kind: str, outcome: str = "in") -> str:
    return f"near_ad_{kind}_fh_gs_CC_-_{outcome}"


def rallies(matches: int = 10, each: int = 4) -> list[Rally]:
    return [
        Rally(
            f"match{m}_{100 * r}_{100 * r + 50}", 51, 25.0, tuple(Event(5 * i, label(k)) for i, k in enumerate(KINDS))
        )
        for m in range(matches)
        for r in range(each)
    ]


def test_every_match_is_in_exactly_one_split() -> None:
    every = rallies()
    parts = split_by_match(every, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=0)
    matches = {name: {match_name(r.video) for r in part} for name, part in parts.items()}
    assert sorted(r.video for part in parts.values() for r in part) == sorted(r.video for r in every)
    assert sum(map(len, matches.values())) == len(set.union(*matches.values())) == 10
    assert [len(matches[n]) for n in ("train", "val", "test")] == [7, 2, 1]
    assert parts == split_by_match(list(every), {"train": 0.7, "val": 0.2, "test": 0.1}, seed=0)
    assert parts != split_by_match(every, {"train": 0.7, "val": 0.2, "test": 0.1}, seed=1)


def test_no_class_is_in_two_splits() -> None:
    parts = split_by_class(rallies(), {"base": 0.6, "novel": 0.4}, seed=0, label_fields=["type"])
    classes = {name: {e.label.split("_")[2] for r in part for e in r.events} for name, part in parts.items()}
    assert classes["base"] | classes["novel"] == set(KINDS)
    assert not classes["base"] & classes["novel"]
    assert sum(len(r.events) for part in parts.values() for r in part) == 120


def test_rare_classes_are_skipped() -> None:
    rare = Rally("match0_900_950", 51, 25.0, (Event(1, label("serve", "winner")),))
    parts = split_by_class([*rallies(), rare], {"a": 0.5, "b": 0.5}, seed=0, min_events=2)
    assert not any("winner" in e.label for part in parts.values() for r in part for e in r.events)


@pytest.mark.parametrize("fractions", [{"a": 1.0}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}])
def test_invalid_fractions_raise(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="fractions"):
        split_by_match(rallies(), fractions, seed=0)


def test_too_few_matches_or_classes_raise() -> None:
    thirds = {"a": 0.4, "b": 0.3, "c": 0.3}
    with pytest.raises(ValueError, match="2 matches cannot be divided into 3 splits"):
        split_by_match(rallies(2), thirds, seed=0)
    with pytest.raises(ValueError, match="1 class "):
        split_by_class(rallies(), thirds, seed=0, label_fields=["player"])
    unlabeled = [replace(r, events=tuple(replace(e, label="") for e in r.events)) for r in rallies()]
    with pytest.raises(ValueError, match="0 classes with at least 1 event cannot be divided"):
        split_by_class(unlabeled, thirds, seed=0, label_fields=["player"])
    assert all(split_by_match(rallies(3), thirds, seed=s)[n] for s in range(5) for n in thirds)


@pytest.mark.parametrize("source", ["generated", "real"])
def test_splits_by_match_are_near_the_fractions(source: str, tmp_path: Path) -> None:
    if source == "real" and not REAL.exists():
        pytest.skip("the F3Set annotations are not next to this repository")
    (tmp_path / "generated.json").write_text(json.dumps(make_f3set_entries(matches=60)))
    every = load_f3set(REAL if source == "real" else tmp_path / "generated.json")
    parts = split_by_match(every, {"train": 0.7, "val": 0.3}, seed=0)
    events = {name: sum(len(r.events) for r in part) for name, part in parts.items()}
    assert events["train"] / sum(events.values()) == pytest.approx(0.7, abs=0.03)
