"""Dataset files of mmaction2 and JSON files of OpenPose become one pickle file per video."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.errors import InputError
from mmdistill.prepare.skeleton_files import SKELETON_DIR, convert_skeletons

FRAMES = 6
WORLD = Path(__file__).resolve().parents[4] / "shared" / "data" / "world" / "skeletons" / "mmaction2_dataset.pkl"


def annotation(video: str, label: object) -> dict[str, Any]:
    rng = np.random.default_rng(len(video))
    return {
        "frame_dir": video, "label": label, "img_shape": (64, 68), "original_shape": (64, 68), "total_frames": FRAMES,
        "keypoint": rng.uniform(5, 60, (2, FRAMES, 17, 2)).astype(np.float16),
        "keypoint_score": rng.uniform(0.5, 1, (2, FRAMES, 17)).astype(np.float16),
    }  # fmt: skip


def write(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def test_dataset_file_becomes_a_file_per_video_and_annotations(tmp_path: Path) -> None:
    entries = [annotation(video, k % 2) for k, video in enumerate(("a", "b", "folder/c"))]
    source = write(tmp_path / "all.pkl", {"split": {"train": ["a", "b"], "val": ["folder/c"]}, "annotations": entries})
    written = convert_skeletons(source, tmp_path / "out")
    assert [path.name for path in written] == ["annotations.json", "train.json", "val.json"]
    rallies = load_f3set(tmp_path / "out/annotations.json")
    assert [(r.video, r.num_frames, [e.label for e in r.events]) for r in rallies] == [
        ("a", FRAMES, ["0"]), ("b", FRAMES, ["1"]), ("folder/c", FRAMES, ["0"]),
    ]  # fmt: skip
    assert [rally.video for rally in load_f3set(tmp_path / "out/val.json")] == ["folder/c"]
    reader = SkeletonReader(tmp_path / "out" / SKELETON_DIR, frame_size=(64, 68))
    for entry in entries:
        rows = reader.read(entry["frame_dir"], range(FRAMES))
        np.testing.assert_allclose(rows[..., :2], entry["keypoint"].transpose(1, 0, 2, 3), atol=1e-3)


def test_list_without_labels_is_a_dataset_too(tmp_path: Path) -> None:
    entries = [{k: v for k, v in annotation(video, 0).items() if k != "label"} for video in "ab"]
    convert_skeletons(write(tmp_path / "all.pkl", entries), tmp_path / "out")
    assert [rally.events for rally in load_f3set(tmp_path / "out/annotations.json")] == [(), ()]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([annotation("../a", 0)], "video 0: frame_dir='../a' is not a file name"),
        ([annotation("a", 0), annotation("a", 0)], "video 1: frame_dir=a occurs twice"),
        ([annotation("a", [1])], r"label=\[1\] is neither a number nor text"),
        ([{"frame_dir": "a", "raw_file": "a.pkl"}], r"keypoint of a has shape \(0,\)"),
        ([], "expected a dict with a list 'annotations'"),
        ({"split": {"train": ["b"]}, "annotations": [annotation("a", 0)]}, "split 'train': b not found"),
    ],
)
def test_error_names_the_invalid_entry(tmp_path: Path, entries: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert_skeletons(write(tmp_path / "all.pkl", entries), tmp_path / "out")


def write_openpose(path: Path, persons: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    people = [{"pose_keypoints_2d": joints.ravel().tolist()} for joints in persons]
    path.write_text(json.dumps({"version": 1.3, "people": people}))


@pytest.mark.parametrize(("num_joints", "left_wrist"), [(25, 7), (18, 7)])
@pytest.mark.parametrize("name", ["clip_{k:012d}_keypoints.json", "clip/{k:05d}_keypoints.json"])
def test_openpose_files_become_rows_of_coco_joints(tmp_path: Path, num_joints: int, left_wrist: int, name: str) -> None:
    rng = np.random.default_rng(0)
    persons = rng.uniform(5, 60, (FRAMES, 2, num_joints, 3))
    persons[..., 2] = np.array([0.4, 0.9])[:, None]  # the second person has the larger scores
    for k in range(FRAMES):
        write_openpose(tmp_path / "json" / name.format(k=k), [] if k == 2 else list(persons[k]))
    convert_skeletons(tmp_path / "json", tmp_path / "out", (64, 68))
    (rally,) = load_f3set(tmp_path / "out/annotations.json")
    assert (rally.video, rally.num_frames, rally.events) == ("clip", FRAMES, ())
    rows = SkeletonReader(tmp_path / "out" / SKELETON_DIR, frame_size=(64, 68)).read("clip", range(FRAMES))
    assert not rows[2].any()
    np.testing.assert_allclose(rows[4, :, 9], persons[4, ::-1, left_wrist], rtol=1e-4)


def test_incomplete_openpose_folders_raise(tmp_path: Path) -> None:
    folder, joints = tmp_path / "json", np.ones((25, 3))
    folder.mkdir()
    with pytest.raises(InputError, match="give --image-size"):
        convert_skeletons(folder, tmp_path / "out")
    with pytest.raises(InputError, match="contains no file"):
        convert_skeletons(folder, tmp_path / "out", (64, 68))
    for k in (0, 1, 3):
        write_openpose(folder / f"a_{k:012d}_keypoints.json", [joints])
    with pytest.raises(InputError, match="a: frame 2 has no file"):
        convert_skeletons(folder, tmp_path / "out", (64, 68))
    write_openpose(folder / "a_000000000002_keypoints.json", [joints[:20]])
    with pytest.raises(InputError, match="20 joints, expected 18 or 25"):
        convert_skeletons(folder, tmp_path / "out", (64, 68))


@pytest.mark.skipif(not WORLD.exists(), reason="the corpus of real files is not next to this repository")
def test_real_dataset_file_is_converted(tmp_path: Path) -> None:
    convert_skeletons(WORLD, tmp_path)
    rallies = load_f3set(tmp_path / "annotations.json")
    assert len(rallies) == len(list((tmp_path / SKELETON_DIR).glob("*.pkl"))) == 4
    assert len({event.label for rally in rallies for event in rally.events}) == 2
