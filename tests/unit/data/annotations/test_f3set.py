"""F3Set JSON: counts of the published files, and the error of every kind of invalid entry."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mmdistill.data.annotations.base import (
    UNKNOWN_FPS,
    AnnotationError,
    Event,
    InvalidEntriesError,
    Player,
    format_rally_counts,
    load_annotations,
)
from mmdistill.data.annotations.f3set import (
    F3SET_FIELDS,
    load_f3set,
    match_name,
    read_f3set,
    select_fields,
    to_json,
)
from mmdistill.data.clips import ClipSpec, build_index
from tests.contracts.annotation_contract import NUM_FRAMES, AnnotationFormatContract
from tests.generated_annotations import make_f3set_entries

ROOT = Path(__file__).resolve().parents[4]
REAL = ROOT.parent / "shared" / "data" / "f3set-tennis"
WORLD = REAL.parent / "world" / "annotations"
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


PLAYERS = {"far_name": "Ana B", "far_hand": "LH", "near_name": "Çe D", "near_hand": "RH"}


def test_names_and_hands_of_players_are_read_and_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = [rally(**PLAYERS), rally(video="m_50_90", near_name="E")]
    found = load_f3set(write(tmp_path / "a.json", entries))
    assert (found[0].near, found[0].far) == (Player("Çe D", "RH"), Player("Ana B", "LH"))
    assert (found[1].near, found[1].far) == (Player("E"), Player())
    assert to_json(found) == entries
    assert not caplog.messages
    (other,) = load_f3set(
        write(tmp_path / "b.json", [rally(near_name=" E\n", near_hand=None, far_name=["A", "B"], far_hand=7)])
    )
    assert (other.near, other.far) == (Player("E"), Player("", "7"))
    assert "b.json: 1 value of far_name or a similar key" in caplog.text


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
        (rally(events=[{"frame": 9, "label": LABEL}, {"frame": 12}]), "event 1: the key 'label' is missing"),
        (rally(events=[{"frame": 9, "label": LABEL}, {"frame": 12, "label": ""}]), "event 1: the key 'label' has no"),
        (rally(events=[{"frame": 9, "label": ["a"]}]), "event 0: label=['a'] is not text"),
        (rally(events=[{"frame": 9, "class": "serve"}]), "no event has the key 'label', but the events have class;"),
        (rally(events=[{"label": LABEL}]), "m_1_40, event 0: the key 'frame' is missing"),
        (rally(events=["x"]), "m_1_40, event 0: expected a JSON object"),
        (rally(num_frames="40 s"), "m_1_40: num_frames='40 s'"),
        (rally(num_frames="-40"), "m_1_40: num_frames='-40'"),
        (rally(fps=0), "m_1_40: fps=0"),
        (rally(fps="29,97"), "m_1_40: fps='29,97' is not a frame rate; use a number, or -1"),
        (rally(fps=-25), "m_1_40: fps=-25"),
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
    with pytest.raises(AnnotationError, match=r"if data_module\.annotations=clips"):
        load_f3set(write(tmp_path / "a.json", {"clips": []}))
    (tmp_path / "a.json").write_text("[{")
    with pytest.raises(AnnotationError, match="not JSON"):
        load_f3set(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text("video,frame,label\na,1,x\n")
    with pytest.raises(AnnotationError, match=r"a\.csv: not JSON .*; F3Set JSON is needed, a list of rallies"):
        load_f3set(tmp_path / "a.csv")


def test_valid_events_of_an_invalid_file_are_sorted_and_unique(tmp_path: Path) -> None:
    frames = [(30, OTHER), (10, LABEL), (10, LABEL), (99, LABEL)]
    entry = rally(events=[{"frame": f, "label": label} for f, label in frames])
    rallies, problems = read_f3set(write(tmp_path / "a.json", [entry]))
    assert [(e.frame, e.label) for e in rallies[0].events] == [(10, LABEL), (30, OTHER)]
    assert [problem.partition(": ")[0] for problem in problems] == [f"m_1_40, event {k}" for k in (1, 2, 3)]


def test_labels_with_selected_fields() -> None:
    assert select_fields(OTHER, None) == OTHER
    assert select_fields(OTHER, ["technique", "player"]) == select_fields(OTHER, ["4", "0"]) == "far_gs"
    assert select_fields("near_left_smash", ["2", "0"]) == "near_smash"
    with pytest.raises(ValueError, match=r"has 3 fields, so .* cannot select position 3"):
        select_fields("near_left_smash", ["3"])
    with pytest.raises(ValueError, match="choose among player"):
        select_fields(OTHER, ["strength"])
    with pytest.raises(ValueError, match="has 2 fields"):
        select_fields("a_b", ["player"])


def test_labels_are_any_text_and_the_frame_rate_may_be_unknown(tmp_path: Path) -> None:
    labels = ["near_left_smash_dl_in", "TJ", "3.5 Soms.Tuck", "VT-0_start", "serve"]
    events = [{"frame": float(k), "label": label} for k, label in enumerate(labels)]
    for fps in (-1, None):
        entry = {"video": "v", "num_frames": 40.0, "fps": fps, "events": events}
        (read,) = load_f3set(write(tmp_path / "a.json", [entry]))
        assert (read.num_frames, read.fps, [e.label for e in read.events]) == (40, UNKNOWN_FPS, labels)
        assert to_json([read])[0]["fps"] == -1
    (read,) = load_f3set(write(tmp_path / "a.json", [rally(events=[{"frame": 1, "label": 7}])]))
    assert read.events == (Event(1, "7"),)


@pytest.mark.usefixtures("new_command")
def test_missing_frame_rate_is_unknown_and_numbers_may_be_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [rally(video=name, num_frames="40", events=[{"frame": "9", "label": LABEL}]) for name in "abc"]
    for entry in entries[:2]:
        del entry["fps"]
    rallies = load_f3set(write(tmp_path / "a.json", entries))
    assert [(r.num_frames, r.fps, r.events) for r in rallies] == [
        (40, fps, (Event(9, LABEL),)) for fps in (UNKNOWN_FPS, UNKNOWN_FPS, 25.0)
    ]
    load_f3set(tmp_path / "a.json")
    (record,) = caplog.records
    assert record.message == f"{tmp_path / 'a.json'}: 2 rallies without fps, their frame rate is unknown"


def test_file_without_a_valid_rally_gets_no_advice_to_write_it(tmp_path: Path) -> None:
    for count, is_given in ((2, True), (1, False)):
        entries = [rally(num_frames=0), rally(video="b")][:count]
        with pytest.raises(InvalidEntriesError) as caught:
            load_f3set(write(tmp_path / "a.json", entries))
        assert ("--write-clean" in str(caught.value)) == is_given


def test_labels_with_another_number_of_fields_than_most_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = [LABEL, OTHER, LABEL.replace("_in", "in"), LABEL]
    load_f3set(write(tmp_path / "a.json", [rally(events=[{"frame": k, "label": x} for k, x in enumerate(labels)])]))
    (record,) = caplog.records
    assert record.message.endswith(
        "1 of 4 events with a label of another number of fields than 8: near_deuce_serve_-_-_T_-in"
    )


def test_events_without_labels_become_training_clips(tmp_path: Path) -> None:
    entries = [rally(video=video, events=[{"frame": k} for k in (5, 20)]) for video in "ab"]
    rallies = load_f3set(write(tmp_path / "a.json", entries))
    assert [r.events for r in rallies] == [(Event(5, ""), Event(20, ""))] * 2
    assert format_rally_counts(rallies) == "2 rallies, 4 events without a label"
    assert to_json(rallies) == entries
    for clips, count in (("events", 4), ("windows", 8)):
        index = build_index(rallies, ClipSpec(clips, 8))
        assert ([clip.label for clip in index.clips], index.classes) == ([-1] * count, ())


@pytest.mark.parametrize("page", ["own_data.md", "own_data.zh.md"])
def test_annotations_of_the_documentation_are_valid(tmp_path: Path, page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "val.json").write_text(example)
    assert len(example.splitlines()) == 10
    assert format_rally_counts(load_f3set(tmp_path / "val.json")) == "2 rallies, 4 events, 3 labels"


# file of shared/data/world/annotations -> format, rallies, events, labels, problems
WORLD_FILES = {
    "meccano_val": ("clips", 4, 57, 40, 0),
    "meccano_unlabel": ("clips", 20, 37, 0, 0),
    "epic-55_unlabel": ("clips", 31, 33, 0, 0),
    "f3set-badminton": ("f3set", 6, 103, 48, 0),
    "f3set-table-tennis": ("f3set", 8, 53, 34, 0),
    "f3set-tennis-doubles": ("f3set", 10, 45, 31, 10),
    "cctvpipe": ("f3set", 6, 52, 12, 0),
    "finediving": ("f3set", 12, 38, 12, 0),
    "finegym": ("f3set", 5, 54, 28, 0),
    "events_without_label": ("f3set", 6, 36, 0, 0),
    "byte_order_mark": ("f3set", 4, 24, 24, 0),
}


@pytest.mark.skipif(not WORLD.exists(), reason="the corpus of real files is not next to this repository")
@pytest.mark.parametrize("name", WORLD_FILES)
def test_real_files_of_other_sources_are_read(name: str, caplog: pytest.LogCaptureFixture) -> None:
    annotations, *expected = WORLD_FILES[name]
    problems = []
    try:
        rallies = load_annotations(WORLD / f"{name}.json", annotations=annotations, frame_number_offset=1)
    except InvalidEntriesError as error:
        rallies, problems = error.rallies, error.problems
    labels = [event.label for r in rallies for event in r.events]
    assert [len(rallies), len(labels), len(set(labels) - {""}), len(problems)] == expected
    repeats = {"meccano_val": 3, "meccano_unlabel": 6, "epic-55_unlabel": 2}.get(name)
    assert [f": {repeats} clips with the video" in r.message for r in caplog.records] == [True] * (repeats is not None)


def test_match_of_a_rally() -> None:
    assert match_name("20210909-W-US_Open-SF-A-B_170943_171285") == "20210909-W-US_Open-SF-A-B"
    assert match_name("holiday_video") == "holiday_video"


@pytest.mark.parametrize(("text", "fps"), [("25", 25.0), ("29.97", 29.97), ("30000/1001", 30000 / 1001), ("-1", -1.0)])
def test_numbers_may_be_text(tmp_path: Path, text: str, fps: float) -> None:
    path = write(tmp_path / "a.json", [rally(fps=text, num_frames="40.0", events=[{"frame": " 3 ", "label": "a"}])])
    (found,) = load_f3set(path)
    assert (found.fps, found.num_frames, found.events[0].frame) == (fps, 40, 3)
