"""Stored heat-maps: types, axes, packed folders, and invalid files."""

from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.heatmaps import HeatmapReader
from mmdistill.data.readers.skeleton_format import SkeletonFormat
from mmdistill.data.readers.zip_file import write_zip
from tests.contracts.reader_contract import ReaderContract

JOINTS, SIZE = 5, (3, 4)


def _reader(root: Path, score_max: float = 1.0) -> HeatmapReader:
    file_format = SkeletonFormat(None, None, score_max, JOINTS)
    return HeatmapReader(root, frame_size=(24, 32), size=SIZE, file_format=file_format)


def _write(root: Path, array: np.ndarray, frame: int = 0) -> Path:
    path = root / "a" / f"{frame:06d}.npy"
    path.parent.mkdir(exist_ok=True)
    np.save(path, array)
    return path


class TestHeatmapReaderContract(ReaderContract):
    frame_shape = (JOINTS, *SIZE)
    dtype = "float16"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        (root / video).mkdir(parents=True)
        for k in range(num_frames):
            np.save(root / video / f"{k:06d}.npy", np.random.default_rng(k).random((JOINTS, *SIZE)))

    def open_reader(self, root: Path) -> Reader:
        return _reader(root)


def test_uint8_is_a_fraction_of_255_and_float_of_score_max(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (JOINTS, *SIZE))
    _write(tmp_path, stored.astype(np.uint8), 0)
    _write(tmp_path, (stored / 255).astype(np.float32), 1)
    _write(tmp_path, (stored / 255).astype(np.float16), 2)
    for k in range(3):
        np.testing.assert_allclose(_reader(tmp_path).read("a", [k])[0], stored / 255, rtol=1e-3)
    _write(tmp_path, stored / 100, 3)
    np.testing.assert_allclose(_reader(tmp_path, score_max=4).read("a", [3])[0], stored / 400, rtol=1e-3)
    np.testing.assert_array_equal(_reader(tmp_path, score_max=4).read("a", [0]), _reader(tmp_path).read("a", [0]))


@pytest.mark.usefixtures("new_command")
def test_joints_may_be_the_last_axis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = np.random.default_rng(0).random((JOINTS, *SIZE)).astype(np.float32)
    _write(tmp_path, stored.transpose(1, 2, 0), 0)
    _write(tmp_path, stored.transpose(1, 2, 0), 1)
    with caplog.at_level("INFO"):
        found = _reader(tmp_path).read("a", [0, 1])
    np.testing.assert_array_equal(found, [stored.astype(np.float16)] * 2)
    assert caplog.text.count("heat-maps of shape [height, width, joints]") == 1


def test_values_within_the_tolerance_are_clipped(tmp_path: Path) -> None:
    stored = np.zeros((JOINTS, *SIZE))
    stored[0, 0, :2] = -5e-4, 1.0005
    _write(tmp_path, stored)
    assert _reader(tmp_path).read("a", [0])[0, 0, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((JOINTS, 4, 3)), r"shape \(5, 4, 3\), expected \(5, 3, 4\), .*correct joints or heatmap_size"),
        (np.zeros((21, *SIZE)), r"shape \(21, 3, 4\), expected \(5, 3, 4\)"),
        (np.zeros(SIZE), r"shape \(3, 4\)"),
        (np.zeros((JOINTS, *SIZE), np.int64), "type int64; heat-maps must be float, or uint8 from 0 to 255"),
        (np.full((JOINTS, *SIZE), np.nan), "NaN or infinite"),
        (np.full((JOINTS, *SIZE), np.inf), "NaN or infinite"),
        (np.full((JOINTS, *SIZE), 200.0), r"from 200 to 200, expected 0 to 1; set data_module\.skeleton_score_max"),
        (np.full((JOINTS, *SIZE), -0.5), r"values from -0\.5 to -0\.5, expected 0 to 1"),
    ],
)
def test_invalid_file_raises_an_error_that_names_it(tmp_path: Path, stored: np.ndarray, message: str) -> None:
    path = _write(tmp_path, stored)
    with pytest.raises(FrameError, match=f"^{path}: .*{message}"):
        _reader(tmp_path).read("a", [0])


def test_motion_is_the_change_of_the_heatmaps(tmp_path: Path) -> None:
    clip = np.zeros((3, JOINTS, *SIZE), np.float16)
    clip[1, 2, 1, 3] = 0.5
    clip[1, 4, 1, 3] = 0.25
    clip[2] = clip[1]
    energy = _reader(tmp_path).motion_energy(clip)
    expected = np.zeros((3, 24, 32), np.float32)
    expected[0, 8:16, 24:32] = 0.75  # one heat-map pixel covers 8 x 8 px of the frame
    np.testing.assert_array_equal(energy, expected)
    np.testing.assert_array_equal(_reader(tmp_path).motion_energy(clip[:1]), np.zeros((1, 24, 32)))


def test_zipped_folder_gives_the_same_arrays(tmp_path: Path) -> None:
    for k in range(3):
        _write(tmp_path, np.random.default_rng(k).random((JOINTS, *SIZE)), k)
    reader, frames = _reader(tmp_path), [2, 0]
    expected = reader.read("a", frames)
    files = sorted((tmp_path / "a").glob("*.npy"))
    write_zip(tmp_path / "a" / "frames.zip", files)
    for path in files:
        path.unlink()
    np.testing.assert_array_equal(_reader(tmp_path).read("a", frames), expected)
    assert _reader(tmp_path).missing_frames("a", [1, 3]) == [3]


def test_settings_change_with_what_changes_the_arrays(tmp_path: Path) -> None:
    assert repr(_reader(tmp_path).settings) != repr(_reader(tmp_path, score_max=2).settings)
