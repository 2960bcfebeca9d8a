"""Flow in pairs of grayscale images."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.flow_images import FlowImageReader
from mmdistill.data.readers.zip_file import write_zip
from tests.contracts.reader_contract import ReaderContract

SIZE = (16, 24)
PATTERN = "{video}/flow_{axis}_{frame:05d}.jpg"
WORLD = Path(__file__).resolve().parents[5] / "shared" / "data" / "world" / "flow" / "uv_jpeg"


def write_flow_images(root: Path, video: str, flow: np.ndarray, *, pattern: str = PATTERN, axes: str = "xy") -> None:
    """Write flow (T, 2, H, W) with the bound 20 px, numbered from 0."""
    gray = np.rint((np.clip(flow, -20, 20) + 20) / 40 * 255).astype(np.uint8)
    for k, images in enumerate(gray):
        for axis, image in zip(axes, images, strict=True):
            path = root / pattern.format(video=video, axis=axis, frame=k)
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)


def constant_flow(num_frames: int = 8) -> np.ndarray:
    """Frame k moves by 2 k - 8 px to the right and 5 - k px down."""
    flow = np.empty((num_frames, 2, *SIZE), np.float32)
    flow[:, 0], flow[:, 1] = ((a * np.arange(num_frames) + b)[:, None, None] for a, b in ((2, -8), (-1, 5)))
    return flow


class TestFlowImageReaderContract(ReaderContract):
    frame_shape = (2, *SIZE)
    dtype = "float16"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        write_flow_images(root, video, constant_flow(num_frames))

    def open_reader(self, root: Path) -> Reader:
        return FlowImageReader(root, frame_size=SIZE, pattern=PATTERN, bound=20)


@pytest.mark.parametrize("pattern", [PATTERN, "{video}/{axis}/frame_{frame:010d}.jpg", "{axis}/{video}/{frame}.png"])
@pytest.mark.parametrize("axes", ["xy", "uv"])
def test_displacements_are_those_that_were_stored(tmp_path: Path, pattern: str, axes: str) -> None:
    flow = np.random.default_rng(0).uniform(-25, 25, (3, 2, 1, 1)) * np.ones((1, 1, *SIZE))
    write_flow_images(tmp_path, "a", flow, pattern=pattern, axes=axes)
    reader = FlowImageReader(tmp_path, frame_size=SIZE, pattern=pattern, bound=20, axes=axes)
    np.testing.assert_allclose(reader.read("a", [0, 2]), np.clip(flow, -20, 20)[[0, 2]], atol=0.16)


def test_one_missing_axis_is_a_missing_frame(tmp_path: Path) -> None:
    write_flow_images(tmp_path, "a", constant_flow())
    reader = FlowImageReader(tmp_path, frame_size=SIZE, pattern=PATTERN, bound=20)
    (tmp_path / "a/flow_x_00003.jpg").unlink()
    (tmp_path / "a/flow_y_00005.jpg").unlink()
    assert reader.missing_frames("a", range(8)) == [3, 5]


def test_images_in_a_zip_are_identical_and_each_folder_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flow_images(tmp_path, "a", constant_flow())
    reader = FlowImageReader(tmp_path, frame_size=SIZE, pattern=PATTERN, bound=20)
    expected = reader.read("a", [5, 2])
    listed: list[object] = []
    list_folder = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: (listed.append(folder), list_folder(folder))[1])
    assert reader.missing_frames("a", range(9)) == [8]
    assert listed == [str(tmp_path / "a")]
    files = [Path(path) for path in reader.files("a", range(8))]
    write_zip(tmp_path / "a/frames.zip", files)
    for file in files:
        file.unlink()
    np.testing.assert_array_equal(reader.read("a", [5, 2]), expected)
    assert reader.missing_frames("a", range(9)) == [8]
    assert reader.files("a", range(8)) == [str(tmp_path / "a/frames.zip")]


def test_images_of_another_kind_raise(tmp_path: Path) -> None:
    write_flow_images(tmp_path, "a", constant_flow(1))
    reader = FlowImageReader(tmp_path, frame_size=SIZE, pattern=PATTERN, bound=20)
    path = str(tmp_path / "a/flow_x_00000.jpg")
    expected = reader.read("a", [0])
    cv2.imwrite(path, cv2.cvtColor(cv2.imread(path, cv2.IMREAD_GRAYSCALE), cv2.COLOR_GRAY2BGR))
    np.testing.assert_allclose(reader.read("a", [0]), expected, atol=0.16)
    colors = np.random.default_rng(0).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
    for image, suffix, message in (
        (colors, ".jpg", "a color image"),
        (np.zeros(SIZE, np.uint16), ".png", "type uint16, expected 8 bits"),
        (np.zeros((8, 8), np.uint8), ".png", "8 x 8 px, expected 16 x 24"),
    ):
        Path(path).write_bytes(cv2.imencode(suffix, image)[1].tobytes())
        with pytest.raises(FrameError, match=message):
            reader.read("a", [0])
    data = cv2.imencode(".png", np.zeros(SIZE, np.uint8))[1].tobytes()
    Path(path).write_bytes(data[:-5])
    with pytest.raises(FrameError, match="truncated PNG"):
        reader.read("a", [0])
    np.save(tmp_path / "flow.npy", np.zeros((2, *SIZE)))
    Path(path).write_bytes((tmp_path / "flow.npy").read_bytes())
    with pytest.raises(FrameError, match="not a JPEG or PNG"):
        reader.read("a", [0])


@pytest.mark.parametrize("pattern", ["{video}/{frame}.jpg", "{axis}/{frame}.jpg", "{video}/{axis}.jpg"])
def test_pattern_without_a_field_raises(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="must contain"):
        FlowImageReader(tmp_path, frame_size=SIZE, pattern=pattern, bound=20)


@pytest.mark.skipif(not WORLD.exists(), reason="the corpus of real files is not next to this repository")
def test_files_of_denseflow_have_the_true_displacement() -> None:
    reader = FlowImageReader(WORLD, frame_size=(64, 68), pattern=PATTERN, frame_number_offset=1, bound=20)
    flow = reader.read("a", range(19))
    np.testing.assert_allclose(flow[:, 0], 2.0, atol=0.16)
    np.testing.assert_allclose(flow[:, 1], -1.0, atol=0.16)
