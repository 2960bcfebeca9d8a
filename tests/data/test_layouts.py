"""Other datasets: the layouts and annotation files of MM-CDFSL's targets and source, on small generated samples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations import AnnotationError, Rally
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.flowfile import write_flow
from mmdistill.data.index import build_index
from mmdistill.data.layouts import ANNOTATION_READERS, annotation_reader, load_annotations
from mmdistill.data.readers import FlowReader, RgbReader

SIZE = (16, 24)
FRAMES = 12

# (frames folder, frame file, flow file) of each dataset, then its clips; files are numbered from 1
LAYOUTS: dict[str, tuple[str, str, str, list[dict[str, Any]]]] = {
    "epic": (
        "P01/P01_01",
        "{video}/frame_{frame:010d}.jpg",
        "{video}/frame_{frame:010d}.npy",
        [
            {"uid": 7, "participant_id": "P01", "video_id": "P01_01", "start_frame": s, "stop_frame": 99, **labels}
            for s, labels in (
                (1, {"verb_label": 0, "noun_label": 4, "action_idx": 3}),
                ("5", {"verb_label": 2, "noun_label": 4, "action_idx": 8}),
            )
        ],
    ),
    "meccano": (
        "0001",
        "{video}/{frame:05d}.jpg",
        "{video}/{frame:05d}.npy",
        [
            {"video_id": "0001", "start_frame": 1, "action_idx": 3},
            {"video_id": "0001", "start_frame": 5, "action_idx": 8},
        ],
    ),
    "wear": (
        "sbj_0",
        "{video}/{frame:06d}.jpg",
        "{video}/{frame:06d}.npy",
        [
            {"video_id": "sbj_0", "label": "jogging", "label_id": 0, "start_frame": 1, "label_id_internal": 0},
            {"video_id": "sbj_0", "label": "lunges", "label_id": 5, "start_frame": 5, "label_id_internal": 1},
        ],
    ),
    "ego4d": (
        "uid-1",
        "{video}/{frame:06d}.jpg",
        "{video}/npy/{frame:06d}.npy",
        [
            {"video_id": "v", "clip_uid": "uid-1", "clip_frame": 1, "verb_label": 3, "noun_label": 9},
            {"video_id": "v", "clip_uid": "uid-1", "clip_frame": 5, "verb_label": 3, "noun_label": 10},
        ],
    ),
}
CLASSES = {
    "epic": ("3", "8"),
    "meccano": ("3", "8"),
    "wear": ("jogging (0)", "lunges (5)"),
    "ego4d": ("3-10", "3-9"),
}


def write_layout(root: Path, name: str) -> Path:
    """Frames and flow of brightness 10 k in frame k, under the dataset's own names, and its annotation file."""
    folder, frame_pattern, flow_pattern, clips = LAYOUTS[name]
    for k in range(FRAMES):
        frame = root / "rgb" / frame_pattern.format(video=folder, frame=k + 1)
        flow = root / "flow" / flow_pattern.format(video=folder, frame=k + 1)
        for path in (frame, flow):
            path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(frame), np.full((*SIZE, 3), 10 * k, np.uint8))
        write_flow(flow, np.full((2, *SIZE), k, np.float32))
    path = root / "annotations.json"
    path.write_text(json.dumps({"version": 1.0, "split": "val", "num_actions": 2, "clips": clips}))
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dataset_is_read_with_its_own_names_and_numbers(tmp_path: Path, name: str) -> None:
    path = write_layout(tmp_path, name)
    _, frame_pattern, flow_pattern, _ = LAYOUTS[name]
    rallies = load_annotations(path, annotations="clips", frames_dir=tmp_path / "rgb", first_number=1)
    assert [r.num_frames for r in rallies] == [FRAMES]
    index = build_index(rallies, clips="events", num_frames=4, anchor="start")
    assert index.classes == CLASSES[name]
    assert sorted(c.frames[0] for c in index.clips) == [0, 4]
    readers = {
        "rgb": RgbReader(tmp_path / "rgb", frame_size=SIZE, pattern=frame_pattern, first_number=1),
        "flow": FlowReader(tmp_path / "flow", frame_size=SIZE, pattern=flow_pattern, first_number=1),
    }
    ds = ClipDataset(index, readers, grid=(2, 1, 1), crop=(16, 16), frame_size=SIZE)
    for i, clip in enumerate(ds.index.clips):
        sample = ds[i]
        np.testing.assert_allclose(sample["rgb"].mean(axis=(1, 2, 3)), [10 * k for k in clip.frames], atol=1)
        np.testing.assert_array_equal(sample["flow"][:, 0, 0, 0], clip.frames)


def test_unlabelled_clips_are_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    clips = [
        {"video_id": "a", "start_frame": 3, "num_frames": 40},
        {"video_id": "b", "start_frame": 0, "num_frames": 9},
    ]
    path.write_text(json.dumps({"split": "train (unlabel)", "clips": clips}))
    rallies = load_annotations(path, annotations="clips")
    assert [(r.video, r.num_frames, r.events) for r in rallies] == [("a", 40, ()), ("b", 9, ())]
    assert len(build_index(rallies, clips="windows", num_frames=8).clips) == 4 + 1


@pytest.mark.parametrize(
    ("clip", "named"),
    [
        ({"start_frame": 1}, "clip 0: clip_uid or video_id is not a file name"),
        ({"video_id": "../x", "start_frame": 1}, "is not a file name"),
        ({"video_id": "a", "num_frames": 9}, "clip 0 \\(a\\): the key 'start_frame' is missing"),
        ({"video_id": "a", "start_frame": -1}, "start_frame=-1 is not a number from 0"),
        ({"video_id": "a", "start_frame": 1, "action_idx": "x"}, "action_idx='x' is not a number"),
        ({"video_id": "a", "start_frame": 9, "num_frames": 9, "action_idx": 1}, "frame 9 is out of range"),
        ({"video_id": "a", "start_frame": 1, "action_idx": 1}, "how long is a"),
        ("text", "clip 0: expected an object"),
    ],
)
def test_what_is_wrong_with_a_clip_is_named(tmp_path: Path, clip: object, named: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"clips": [clip]}))
    with pytest.raises(AnnotationError, match=named):
        load_annotations(path, annotations="clips")


def test_duplicates_and_other_shapes_of_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    clip = {"video_id": "a", "start_frame": 1, "num_frames": 9, "action_idx": 1}
    path.write_text(json.dumps({"clips": [clip, clip]}))
    with pytest.raises(AnnotationError, match=r"clip 1 \(a\) is a duplicate"):
        load_annotations(path, annotations="clips")
    path.write_text("[]")
    with pytest.raises(AnnotationError, match="a list 'clips'"):
        load_annotations(path, annotations="clips")


@pytest.fixture
def registered() -> Callable[[str], None]:
    names: list[str] = []
    yield names.append  # type: ignore[misc]
    for name in names:
        del ANNOTATION_READERS[name]


def test_a_format_of_ones_own_is_one_function(tmp_path: Path, registered: Callable[[str], None]) -> None:
    @annotation_reader("lines")
    def lines(path: Path, _frames: Path | None, _first: int) -> list[Rally]:
        return [Rally(line, 20, 30.0, ()) for line in path.read_text().split()]

    registered("lines")
    (tmp_path / "a.txt").write_text("one two")
    assert [r.video for r in load_annotations(tmp_path / "a.txt", annotations="lines")] == ["one", "two"]
    with pytest.raises(ValueError, match="registered already"):
        annotation_reader("lines")(lines)
    with pytest.raises(ValueError, match="'nothing' is not one of clips, f3set, lines"):
        load_annotations(tmp_path / "a.txt", annotations="nothing")
