"""Skeletons: persons, scores, the file cache, and invalid files."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.skeleton import SkeletonReader
from tests.contracts.reader_contract import ReaderContract
from tests.synthetic_dots import DotVideo, write_dot_video

SIZE = (64, 96)


class TestSkeletonReaderContract(ReaderContract):
    frame_shape = (2, 17, 3)
    dtype = "float32"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        write_dot_video(root, video=video, frames=num_frames)

    def open_reader(self, root: Path) -> Reader:
        return SkeletonReader(root / "skeleton", frame_size=SIZE)


def _skeleton(frames: int = 6, persons: int | None = 2) -> dict[str, object]:
    shape = (frames, 17) if persons is None else (persons, frames, 17)
    return {
        "keypoint": np.full((*shape, 2), 10.0),
        "keypoint_score": np.ones(shape),
        "total_frames": frames,
        "img_shape": (128, 192),
    }


def test_missing_row_and_file_raise(dot: DotVideo) -> None:
    with pytest.raises(FrameError, match=r"no row for frame 24, the file has 24 rows"):
        dot.readers()["skeleton"].read("dot", [24])
    with pytest.raises(FrameError, match=r"none.pkl: no such skeleton file"):
        dot.readers()["skeleton"].read("none", [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoint": None}, "the key 'keypoint' is missing; the file has img_shape"),
        ({"img_shape": None}, "the key 'img_shape' is missing"),
        ({"total_frames": 9}, "total_frames=9, but keypoint has 6 rows"),
        ({"keypoint": np.zeros((2, 6, 18, 2))}, r"shape \(2, 6, 18, 2\)"),
        ({"keypoint_score": np.zeros((2, 5, 17))}, r"keypoint_score has shape \(2, 5, 17\)"),
        ({"keypoint": "text"}, "are not numbers"),
        ({"img_shape": (0, 5)}, "expected \\(height, width\\)"),
        ({"keypoint_score": -np.ones((2, 6, 17))}, "negative"),
    ],
)
def test_error_names_the_invalid_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    entry = {k: v for k, v in {**_skeleton(), **change}.items() if v is not None}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    with pytest.raises(FrameError, match=message):
        SkeletonReader(tmp_path, frame_size=(64, 96)).read("v", [0])


def test_nan_joint_is_absent_without_a_score_and_raises_with_one(tmp_path: Path) -> None:
    entry = _skeleton()
    entry["keypoint"][1, 3, 5] = np.nan  # type: ignore[index]
    entry["keypoint_score"][1, 3, 5] = 0  # type: ignore[index]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    array = SkeletonReader(tmp_path, frame_size=(64, 96)).read("v", range(6))
    assert not array[3, 1, 5].any()
    entry["keypoint_score"][1, 3, 5] = 0.5  # type: ignore[index]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    reader = SkeletonReader(tmp_path, frame_size=(64, 96))
    reader.read("v", [0, 1, 2])
    with pytest.raises(FrameError, match="keypoint_score is not finite at frame 3, person 1, joint 5"):
        reader.read("v", [2, 3])


@pytest.mark.parametrize("persons", [None, 1, 2, 4])
def test_number_of_persons_is_constant(tmp_path: Path, persons: int | None) -> None:
    entry = _skeleton(persons=persons)
    if persons == 4:
        entry["keypoint"] = np.arange(4.0)[:, None, None, None] * np.ones((4, 6, 17, 2))
        entry["keypoint_score"] = np.array([0.1, 0.9, 0.2, 0.8])[:, None, None] * np.ones((4, 6, 17))
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    array = SkeletonReader(tmp_path, frame_size=(128, 192)).read("v", [0])
    assert array.shape == (1, 2, 17, 3)
    if persons == 4:
        np.testing.assert_allclose(array[0, :, 0, 2], [0.9, 0.8])
        np.testing.assert_allclose(array[0, :, 0, 0], [1, 3], atol=1e-5)


def test_file_is_unpickled_once_within_the_cache_size(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(_skeleton()))
    file_bytes = 6 * 2 * 17 * 3 * 4
    reader = SkeletonReader(tmp_path, frame_size=(64, 96), cache_bytes=2 * file_bytes)
    for name in "aabbaab":
        reader.read(name, [0])
    assert reader.files_read == 2
    for name in "cacb":  # c evicts a, the least recently used; then a evicts b
        reader.read(name, [0])
    assert reader.files_read == 5
    assert reader._cached_bytes <= 2 * file_bytes
