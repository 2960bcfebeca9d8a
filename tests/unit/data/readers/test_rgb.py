"""RGB frames: sizes, damaged and unusual JPEG files."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.zip_file import write_zip
from tests.contracts.reader_contract import ReaderContract
from tests.synthetic_dots import DotVideo, write_dot_video

SIZE = (64, 96)


class TestRgbReaderContract(ReaderContract):
    frame_shape = (*SIZE, 3)
    dtype = "uint8"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        write_dot_video(root, video=video, frames=num_frames)

    def open_reader(self, root: Path) -> Reader:
        return RgbReader(root / "frames", frame_size=SIZE)


class TestZipContract(TestRgbReaderContract):
    """The files of each folder are in a ``frames.zip``."""

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        super().write_video(root, video, num_frames)
        pack_zip(root / "frames" / video)

    def test_deleted_file_raises_an_error_that_names_it(self, reader: Reader) -> None:
        """Without the archive the folder is one of separate files."""
        archive = Path(reader.files("a", [2])[0])
        archive.unlink()
        with pytest.raises(FrameError, match=r"000002.jpg: no such rgb file"):
            reader.read("a", [2])
        assert reader.missing_frames("a", [2]) == [2]


def pack_zip(folder: Path) -> Path:
    """Replace the files of a folder by a ``frames.zip``."""
    files = list(folder.iterdir())
    write_zip(folder / "frames.zip", files)
    for file in files:
        file.unlink()
    return folder / "frames.zip"


def test_frames_in_a_zip_are_identical(dot: DotVideo) -> None:
    reader = RgbReader(dot.root / "frames", frame_size=dot.size)
    frames, expected = [3, 0, 22, 3], reader.read("dot", [3, 0, 22, 3])
    archive = pack_zip(dot.root / "frames/dot")
    np.testing.assert_array_equal(reader.read("dot", frames), expected)
    assert reader.missing_frames("dot", range(26)) == [24, 25]
    assert reader.files("dot", frames) == [str(archive)]
    with pytest.raises(FrameError, match=r"frames.zip: contains no rgb file 000099.jpg"):
        reader.read("dot", [3, 99])
    data = bytearray(archive.read_bytes())
    position = data.index(b"\xff\xd9", data.index(b"000003.jpg"))  # the end marker of frame 3
    data[position : position + 2] = b"\0\0"
    archive.write_bytes(data)
    with pytest.raises(FrameError, match=r"frames.zip/000003.jpg: truncated JPEG"):
        reader.read("dot", [3])
    array, repeated = reader.read_with_repeats("dot", [2, 3])
    assert repeated == [3]
    np.testing.assert_array_equal(array[0], array[1])


def test_truncated_zip_raises_in_each_method(dot: DotVideo) -> None:
    reader = dot.readers()["rgb"]
    archive = pack_zip(dot.root / "frames/dot")
    reader.read("dot", [0])
    archive.write_bytes(archive.read_bytes()[:-30])
    for call in (reader.read, reader.missing_frames, reader.read_with_repeats):
        with pytest.raises(FrameError, match=r"frames.zip: truncated, or not a zip archive; write it again"):
            call("dot", [0])


@pytest.mark.parametrize(("keep", "message"), [(0, "empty file"), (0.5, "truncated JPEG"), (0.99, "truncated JPEG")])
def test_damaged_jpeg_raises(dot: DotVideo, keep: float, message: str) -> None:
    path = dot.root / "frames/dot/000002.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FrameError, match=message) as caught:
        dot.readers()["rgb"].read("dot", [1, 2, 3])
    assert str(path) in str(caught.value)


def test_wrong_size_and_missing_file_raise(dot: DotVideo) -> None:
    reader = RgbReader(dot.root / "frames", frame_size=(64, 98))
    with pytest.raises(FrameError, match=r"64 x 96 px, expected 64 x 98 from data_module.frame_size"):
        reader.read("dot", [0])
    with pytest.raises(FrameError, match=r"000099.jpg: no such rgb file"):
        dot.readers()["rgb"].read("dot", [99])


def test_padding_after_the_end_marker_is_allowed(dot: DotVideo) -> None:
    path = dot.root / "frames/dot/000002.jpg"
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 40 + b"\n")
    assert dot.readers()["rgb"].read("dot", [2]).shape == (1, 64, 96, 3)
    path.write_bytes(data[: len(data) // 2] + b"\0" * (len(data) // 2))  # a copy that stopped on a preallocated file
    with pytest.raises(FrameError, match="truncated JPEG"):
        dot.readers()["rgb"].read("dot", [2])


def test_progressive_and_gray_jpegs_decode(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    image = np.full((16, 24), 200, np.uint8)
    cv2.imwrite(str(tmp_path / "v/000000.jpg"), image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert RgbReader(tmp_path, frame_size=(16, 24)).read("v", [0]).mean() == pytest.approx(200, abs=2)
