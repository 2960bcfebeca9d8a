"""Flow: shapes, values that are not finite, and files that are not flow."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.flow import FlowReader
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
