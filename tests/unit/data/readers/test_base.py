"""The frame numbering that all readers share, file name patterns, and repeated frames."""

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, is_unique_frame_pattern
from mmdistill.data.readers.rgb import RgbReader
from tests.synthetic_dots import LEFT_WRIST, DotVideo


def test_frame_flow_and_joint_of_one_number_agree(dot: DotVideo) -> None:
    frames = [20, 3, 4, 22]
    arrays = {name: reader.read("dot", frames) for name, reader in dot.readers().items()}
    assert (arrays["rgb"].dtype, arrays["rgb"].shape) == (np.uint8, (4, 64, 96, 3))
    assert (arrays["flow"].dtype, arrays["flow"].shape) == (np.float16, (4, 2, 64, 96))
    assert (arrays["skeleton"].dtype, arrays["skeleton"].shape) == (np.float32, (4, 2, 17, 3))
    for position, k in enumerate(frames):
        x, y = dot.positions[k]
        red = arrays["rgb"][position, ..., 0].astype(int) - arrays["rgb"][position, ..., 2]  # RGB, not BGR
        assert red[y, x] > 150
        ys, xs = np.nonzero(red > 100)
        assert (xs.mean(), ys.mean()) == pytest.approx((x, y))
        assert tuple(arrays["flow"][position, :, y, x]) == tuple(dot.positions[k + 1] - dot.positions[k])
        np.testing.assert_allclose(arrays["skeleton"][position, 0, LEFT_WRIST], [x, y, 1], atol=1e-4)
        assert not arrays["skeleton"][position, 1].any()


@pytest.mark.parametrize("pattern", ["{vid}/{frame}.jpg", "{video}/frame.jpg", "{frame:06d}.jpg", "{video}/{}.jpg"])
def test_pattern_with_equal_names_for_two_frames_raises(pattern: str) -> None:
    assert not is_unique_frame_pattern(pattern)
    with pytest.raises(ValueError, match=r"must contain \{video\} and \{frame\}, like"):
        RgbReader("frames", frame_size=(8, 8), pattern=pattern)


def test_pattern_and_frame_number_offset(dot: DotVideo) -> None:
    folder = dot.root / "frames/P01_01"
    folder.mkdir()
    for k in range(4):
        (dot.root / f"frames/dot/{k:06d}.jpg").rename(folder / f"frame_{k + 1:010d}.jpg")
    reader = RgbReader(
        dot.root / "frames", frame_size=dot.size, pattern="{video}/frame_{frame:010d}.jpg", frame_number_offset=1
    )
    x, y = dot.positions[2]
    assert reader.read("P01_01", [2])[0, y, x, 0] > 150
    assert reader.missing_frames("P01_01", [0, 3, 4]) == [4]
    assert reader.missing_frames("nowhere", [0, 1]) == [0, 1]


def test_repeats_use_the_nearest_readable_frame(dot: DotVideo) -> None:
    reader = dot.readers()["rgb"]
    complete = reader.read("dot", range(8))
    for k in (2, 3, 4, 7):
        (dot.root / f"frames/dot/{k:06d}.jpg").unlink()
    array, repeated = reader.read_with_repeats("dot", range(8))
    assert repeated == [2, 3, 4, 7]
    np.testing.assert_array_equal(array, complete[[0, 1, 1, 1, 5, 5, 6, 6]])
    with pytest.raises(FrameError):
        reader.read_with_repeats("dot", [2, 3])
