"""F3Set JSON: counts of the published files, and the error of every kind of invalid entry."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mmdistill.data.annotations.base import AnnotationError
from mmdistill.data.annotations.f3set import (
    F3SET_FIELDS,
    load_f3set,
    match_name,
    read_f3set,
    select_fields,
    to_json,
)
from tests.contracts.annotation_contract import NUM_FRAMES, AnnotationFormatContract
from tests.generated_annotations import make_f3set_entries

REAL = Path(__file__).resolve().parents[5] / "shared" / "data" / "f3set-tennis"
LABEL = "near_deuce_serve_-_-_T_-_in"
OTHER = "far_ad_return_bh_gs_CC_-_in"


def write(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries))
    return path


def rally(**changes: object) -> dict[str, object]:
    events = [{"frame": 10, "label": LABEL}, {"frame": 30, "label": OTHER}]
    return {"video": "m_1_40", "num_frames": 40, "fps": 25.0, "events": events, **changes}


class TestF3SetContract(AnnotationFormatContract):
    format_name = "f3set"

    def write_annotations(self, path: Path, videos: Mapping[str, Sequence[int]]) -> None:
        entries = [
            rally(video=video, num_frames=NUM_FRAMES, events=[{"frame": k, "label": LABEL} for k in frames])
            for video, frames in videos.items()
        ]
        write(path, entries)


@pytest.mark.skipif(not REAL.exists(), reason="the F3Set annotations are not next to this repository")
@pytest.mark.parametrize(
    ("split", "rallies", "events", "labels"), [("val", 1883, 6994, 638), ("test", 2265, 8717, 620)]
)
def test_real_files_have_the_published_counts(split: str, rallies: int, events: int, labels: int) -> None:
    read = load_f3set(REAL / f"{split}.json")
    every = [event for r in read for event in r.events]
    assert (len(read), len(every), len({e.label for e in every})) == (rallies, events, labels)


def test_file_with_all_keys_of_f3set_is_read_completely(tmp_path: Path) -> None:
    """Videos, lengths, frame rates and events of a generated file with several matches and all kinds of labels."""
    entries = make_f3set_entries()
    rallies = load_f3set(write(tmp_path / "a.json", entries))
    assert [(r.video, r.num_frames, r.fps) for r in rallies] == [
        (entry["video"], entry["num_frames"], entry["fps"]) for entry in entries
    ]
    for read, entry in zip(rallies, entries, strict=True):
        assert [(e.frame, e.label) for e in read.events] == [(e["frame"], e["label"]) for e in entry["events"]]
    labels = [event.label for read in rallies for event in read.events]
    values = {field: {select_fields(label, [field]) for label in labels} for field in F3SET_FIELDS}
    assert values["type"] == {"serve", "return", "stroke"}
    assert values["player"] == {"near", "far"}
    assert all(len(found) > 1 for found in values.values())
    assert len({match_name(read.video) for read in rallies}) == 6


def test_written_entries_equal_the_read_ones(tmp_path: Path) -> None:
    entries = [rally(), rally(video="m_50_90", events=[])]
    assert to_json(load_f3set(write(tmp_path / "a.json", entries))) == entries


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (rally(events=[{"frame": 40, "label": LABEL}]), "m_1_40, event 0: frame=40 is out of range"),
        (rally(events=[{"frame": -1, "label": LABEL}]), "m_1_40, event 0: frame=-1 is out of range"),
        (rally(events=[{"frame": 3.5, "label": LABEL}]), "event 0: frame=3.5 is not an integer"),
        (
            rally(events=[{"frame": 9, "label": LABEL}, {"frame": 3, "label": LABEL}]),
            "event 1: frame 3 comes after",
        ),
        (rally(events=[{"frame": 9, "label": LABEL}, {"frame": 9, "label": LABEL}]), "event 1: a duplicate of frame 9"),
        (rally(events=[{"frame": 9, "label": "near_serve"}]), "'near_serve' has 2 fields, not 8"),
        (rally(events=[{"label": LABEL}]), "m_1_40, event 0: the key 'frame' is missing"),
        (rally(events=["x"]), "m_1_40, event 0: expected a JSON object"),
        (rally(num_frames="40"), "m_1_40: num_frames='40'"),
        (rally(fps=0), "m_1_40: fps=0"),
        (rally(video="../etc"), "is not a file name"),
        ({"video": "v", "num_frames": 3, "fps": 25.0}, "v: the key 'events' is missing"),
        ([1], "rally 0: expected a JSON object, got list"),
    ],
)
def test_error_names_rally_and_event(tmp_path: Path, entry: object, message: str) -> None:
    with pytest.raises(AnnotationError) as caught:
        load_f3set(write(tmp_path / "a.json", [entry]))
    assert message in str(caught.value)


def test_duplicate_videos_empty_and_invalid_files_raise(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="occurs twice"):
        load_f3set(write(tmp_path / "a.json", [rally(), rally()]))
    with pytest.raises(AnnotationError, match="no rally"):
        load_f3set(write(tmp_path / "a.json", []))
    with pytest.raises(AnnotationError, match="expected a JSON list"):
        load_f3set(write(tmp_path / "a.json", {}))
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(AnnotationError, match="not JSON"):
        load_f3set(tmp_path / "a.json")


def test_valid_events_of_an_invalid_file_are_sorted_and_unique(tmp_path: Path) -> None:
    frames = [(30, OTHER), (10, LABEL), (10, LABEL), (99, LABEL)]
    entry = rally(events=[{"frame": f, "label": label} for f, label in frames])
    rallies, problems = read_f3set(write(tmp_path / "a.json", [entry]))
    assert [(e.frame, e.label) for e in rallies[0].events] == [(10, LABEL), (30, OTHER)]
    assert [problem.partition(": ")[0] for problem in problems] == [f"m_1_40, event {k}" for k in (1, 2, 3)]


def test_labels_with_selected_fields() -> None:
    assert select_fields(OTHER, None) == OTHER
    assert select_fields(OTHER, ["technique", "player"]) == "far_gs"
    with pytest.raises(ValueError, match="choose among player"):
        select_fields(OTHER, ["strength"])
    with pytest.raises(ValueError, match="has 2 fields"):
        select_fields("a_b", ["player"])


def test_match_of_a_rally() -> None:
    assert match_name("20210909-W-US_Open-SF-A-B_170943_171285") == "20210909-W-US_Open-SF-A-B"
    assert match_name("holiday_video") == "holiday_video"
