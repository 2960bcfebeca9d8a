"""Where the videos of the examples are, and which of their frames are known."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Event, Rally
from mmdistill.evaluation.labeled_frames import LabeledFile, locate_examples, video_name
from mmdistill.evaluation.video_features import TO_END
from mmdistill.prepare.video import VideoError

EVENTS = (Event(20, "a"), Event(40, "b"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``new.mp4``, ``old.MKV``, ``match.mp4`` and the folder ``frames`` with an image."""
    for name in ("new.mp4", "old.MKV", "match.mp4", "old.txt"):
        (tmp_path / name).touch()
    (tmp_path / "frames").mkdir()
    cv2.imwrite(str(tmp_path / "frames" / "000000.jpg"), np.zeros((8, 8, 3), np.uint8))
    return tmp_path


def locate(folder: Path, *rallies: Rally, complete: bool = False) -> dict[str, LabeledFile]:
    found = locate_examples(rallies, folder / "new.mp4", [folder], complete=complete)
    return {path.name: file for path, file in found.items()}


@pytest.mark.parametrize(
    ("name", "file"),
    [("new", "new.mp4"), ("new.mp4", "new.mp4"), ("old", "old.MKV"), ("old.MKV", "old.MKV"), ("frames", "frames")],
)
def test_a_video_is_found_by_its_name(folder: Path, name: str, file: str):
    found = locate(folder, Rally(name, 0, UNKNOWN_FPS, EVENTS))
    assert list(found) == [file]
    assert found[file].events == list(EVENTS)


def test_rallies_of_a_match_have_their_frames_in_the_match(folder: Path):
    rallies = (
        Rally("match_100_160", 60, 25.0, EVENTS),
        Rally("match_300_350", 50, 25.0, ()),
        Rally("match", 0, -1.0, EVENTS),
    )
    file = locate(folder, *rallies)["match.mp4"]
    assert [event.frame for event in file.events] == [120, 140, 20, 40]
    assert file.names == [("match_100_160", 20), ("match_100_160", 40), ("match", 20), ("match", 40)]
    assert file.complete == [(300, 350)]  # a rally without a stroke shows none
    assert file.fps == 25


def test_known_frames_are_near_strokes_or_in_complete_rallies(folder: Path):
    partial = locate(folder, Rally("old", 60, 25.0, EVENTS))["old.MKV"]
    assert partial.known_ranges(10.0) == [(15, 26), (35, 46)]
    assert partial.known_ranges(25.0) == [(8, 53)]  # 12 frames on each side, which overlap
    assert partial.known_ranges(UNKNOWN_FPS) == [(8, 53)]
    assert partial.known_ranges(1.0) == [(18, 23), (38, 43)]
    assert locate(folder, Rally("old", 60, 25.0, EVENTS), complete=True)["old.MKV"].known_ranges(10.0) == [(0, 60)]
    assert locate(folder, Rally("old", 0, -1.0, EVENTS), complete=True)["old.MKV"].known_ranges(10.0) == [(0, TO_END)]
    assert locate(folder, Rally("new", 60, 25.0, ()))["new.mp4"].known_ranges(10.0) == []  # it is to be labeled
    assert locate(folder, Rally("new_0_50", 50, 25.0, ()))["new.mp4"].known_ranges(10.0) == [(0, 50)]


def test_a_video_in_two_files_has_the_length_and_the_strokes_of_both(folder: Path):
    rallies = (
        Rally("match_100_160", 60, 25.0, ()),
        Rally("match_300_350", 50, 25.0, ()),
        Rally("match_300_350", 50, 25.0, ()),
    )
    corrected = Rally("match_100_160", 0, UNKNOWN_FPS, EVENTS)
    file = locate(folder, *rallies, corrected, corrected)["match.mp4"]
    assert [event.frame for event in file.events] == [120, 140]  # equal strokes count once
    assert file.without_stroke == ["match_300_350"]
    assert file.known_ranges(10.0) == [(115, 126), (135, 146), (300, 350)]
    file = locate(folder, *rallies, corrected, complete=True)["match.mp4"]
    assert (file.fps, file.known_ranges(10.0)) == (25.0, [(100, 160), (300, 350)])


def test_an_unknown_or_ambiguous_name_is_an_error(folder: Path):
    with pytest.raises(
        VideoError, match=r"no video file and no folder of frames gone_1_2 or gone in .*; give its folder"
    ):
        locate(folder, Rally("gone_1_2", 0, -1.0, EVENTS))
    (folder / "old.mp4").touch()
    with pytest.raises(VideoError, match=r"old\.MKV and .*old\.mp4 have the same name"):
        locate(folder, Rally("old", 0, -1.0, EVENTS))


def test_contradicting_examples_are_an_error(folder: Path):
    with pytest.raises(AnnotationError, match="old: frame 20 has two labels, a and c; remove one"):
        locate(folder, Rally("old", 60, 25.0, (*EVENTS, Event(20, "c"))))
    with pytest.raises(AnnotationError, match="old: frame 20 has two labels, a and c; remove one"):
        locate(folder, Rally("old", 60, 25.0, EVENTS), Rally("old", 0, UNKNOWN_FPS, (Event(20, "c"),)))  # of two files
    with pytest.raises(AnnotationError, match=r"match_100_160: fps=30.0, but another rally of .* has 25.0"):
        locate(folder, Rally("match", 0, 25.0, EVENTS), Rally("match_100_160", 60, 30.0, EVENTS))


def test_names_of_files_and_folders(folder: Path):
    (folder / "a.b").mkdir()
    assert [video_name(folder / name) for name in ("new.mp4", "frames", "a.b")] == ["new", "frames", "a.b"]
