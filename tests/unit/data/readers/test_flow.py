"""Flow: shapes, values that are not finite, and files that are not flow."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import FLOW_DTYPES, pack_flow, write_flow
from tests.contracts.reader_contract import ReaderContract
from tests.synthetic_dots import DotVideo, write_dot_video

SIZE = (64, 96)


class TestFlowReaderContract(ReaderContract):
    frame_shape = (2, *SIZE)
    dtype = "float16"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        write_dot_video(root, video=video, frames=num_frames)

    def open_reader(self, root: Path) -> Reader:
        return FlowReader(root / "flow", frame_size=SIZE)


class TestPackedFlowContract(TestFlowReaderContract):
    """The flow of each video is in a ``flow.npy``."""

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        super().write_video(root, video, num_frames)
        pack_files(root / "flow" / video)

    def test_deleted_file_raises_an_error_that_names_it(self, reader: Reader) -> None:
        """Without the packed file the folder is one of separate files."""
        Path(reader.files("a", [2])[0]).unlink()
        with pytest.raises(FrameError, match=r"pair_00002.npy: no such flow file"):
            reader.read("a", [2])
        assert reader.missing_frames("a", [2]) == [2]


def pack_files(folder: Path) -> Path:
    """Replace the files of a folder by a ``flow.npy``."""
    files = list(folder.iterdir())
    pack_flow(folder / "flow.npy", files)
    for file in files:
        file.unlink()
    return folder / "flow.npy"


@pytest.mark.parametrize("dtype", FLOW_DTYPES)
def test_packed_flow_is_identical(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "v").mkdir()
    for k in range(6):
        write_flow(tmp_path / f"v/pair_{k:05d}.npy", rng.normal(0, 3 + k, (2, *SIZE)).astype(np.float32), dtype=dtype)
    size = sum(path.stat().st_size for path in (tmp_path / "v").iterdir())
    reader = FlowReader(tmp_path, frame_size=SIZE)
    expected = reader.read("v", [4, 0, 5, 4])
    packed = pack_files(tmp_path / "v")
    assert packed.stat().st_size < size
    np.testing.assert_array_equal(reader.read("v", [4, 0, 5, 4]), expected)
    assert reader.missing_frames("v", range(8)) == [6, 7]
    assert reader.files("v", [1, 2]) == [str(packed)]
    with pytest.raises(FrameError, match=r"flow.npy: no flow of frame 6, the file has 6 frames"):
        reader.read("v", [5, 6])
    with pytest.raises(FrameError, match=r"flow.npy: frame 1: shape \(2, 64, 96\), expected \(2, 96, 64\)"):
        FlowReader(tmp_path, frame_size=(96, 64)).read("v", [1])
    packed.write_bytes(packed.read_bytes()[:-1])
    for call in (reader.read, reader.missing_frames):
        with pytest.raises(FrameError, match=r"flow.npy: truncated, or not a .npy file of numbers"):
            call("v", [0])
    np.save(packed, np.zeros((2, *SIZE), np.float32))
    with pytest.raises(FrameError, match=r"flow.npy: expected the flow of all frames, \(T, 2, height, width\)"):
        reader.read("v", [0])


def test_flow_files_of_different_formats_are_not_packed(tmp_path: Path) -> None:
    for k, dtype in enumerate(("float16", "float32")):
        write_flow(tmp_path / f"{k}.npy", np.zeros((2, *SIZE), np.float32), dtype=dtype)
    with pytest.raises(ValueError, match=r"1.npy: another format or size than .*0.npy"):
        pack_flow(tmp_path / "flow.npy", [tmp_path / "1.npy", tmp_path / "0.npy"])
    assert not (tmp_path / "flow.npy").exists()


def test_wrong_size_and_missing_file_raise(dot: DotVideo) -> None:
    with pytest.raises(FrameError, match=r"pair_00023.npy: no such flow file"):
        dot.readers()["flow"].read("dot", [23])
    with pytest.raises(FrameError, match=r"shape \(2, 64, 96\)"):
        FlowReader(dot.root / "flow", frame_size=(96, 64)).read("dot", [0])


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.99])
def test_truncated_file_raises(dot: DotVideo, keep: float) -> None:
    path = dot.root / "flow/dot/pair_00002.npy"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FrameError, match=r"pair_00002.npy"):
        dot.readers()["flow"].read("dot", [2])


def test_image_in_place_of_a_flow_file_is_named(dot: DotVideo) -> None:
    """The error advises no unsafe loading."""
    path = dot.root / "flow/dot/pair_00002.npy"
    for suffix in (".jpg", ".png"):
        path.write_bytes(cv2.imencode(suffix, np.zeros((64, 96), np.uint8))[1].tobytes())
        with pytest.raises(FrameError, match=r"pair_00002.npy: an image; .*flow_pattern .* \{axis\}, and") as caught:
            dot.readers()["flow"].read("dot", [2])
        assert caught.value.__suppress_context__
        assert "pickle" not in str(caught.value)


def test_values_that_are_not_finite_or_not_numbers_raise(dot: DotVideo) -> None:
    path = dot.root / "flow/dot/pair_00002.npy"
    flow = np.zeros((2, 64, 96), np.float32)
    for bad in (np.nan, np.inf, 1e6):
        flow[1, 5, 5] = bad
        np.save(path, flow)
        with pytest.raises(FrameError, match="NaN, infinite or too large for float16"):
            dot.readers()["flow"].read("dot", [2])
    np.save(path, np.zeros((2, 64, 96), np.uint8))
    with pytest.raises(FrameError, match="type uint8"):
        dot.readers()["flow"].read("dot", [2])
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(FrameError, match=r"pair_00002.npy"):
        dot.readers()["flow"].read("dot", [2])
