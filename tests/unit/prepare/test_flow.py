"""Flow functions: shape, direction, unit, and motion that explains the next frame."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.prepare.flow import FLOW_METHODS, make_flow_function
from mmdistill.prepare.video import decode_frames
from tests.generated_video import BroadcastClip


def gray_pair(path: Path, first: int) -> list[np.ndarray]:
    """Frames `first` and `first` + 1 at 224 x 398 px."""
    images = []
    for frame in decode_frames(path):
        if frame.number >= first:
            image = cv2.resize(frame.pixels, (398, 224), interpolation=cv2.INTER_AREA)
            images.append(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
        if len(images) == 2:
            break
    return images


def warp_error_ratio(first: np.ndarray, second: np.ndarray, flow: np.ndarray) -> float:
    """Error of `second` warped back by the flow over the error of `second` itself, on moving pixels; 1 for no flow."""
    ys, xs = np.mgrid[:224, :398].astype(np.float32)
    warped = cv2.remap(second, xs + flow[0], ys + flow[1], cv2.INTER_LINEAR).astype(float)
    moving = np.hypot(*flow) > 1
    assert moving.sum() > 30
    unwarped_error = np.abs(second.astype(float) - first)[moving].mean()
    return float(np.abs(warped - first)[moving].mean() / unwarped_error)


@pytest.mark.parametrize("method", FLOW_METHODS)
def test_flow_is_the_displacement_of_the_first_image(method: str) -> None:
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (64, 80), np.uint8), (0, 0), 2)
    flow = make_flow_function(method)(texture, np.roll(texture, (1, 3), axis=(0, 1)))
    assert (flow.shape, flow.dtype) == ((2, 64, 80), np.float32)
    np.testing.assert_allclose(np.median(flow, axis=(1, 2)), [3, 1], atol=0.2)


def test_unknown_method_is_rejected() -> None:
    with pytest.raises(ValueError, match="flow='raft' is not one of dis, farneback"):
        make_flow_function("raft")


def test_flow_explains_the_motion_of_a_generated_broadcast(broadcast: BroadcastClip) -> None:
    first, second = gray_pair(broadcast.path, 12)
    assert warp_error_ratio(first, second, make_flow_function("dis")(first, second)) < 0.8


def test_flow_explains_the_motion_of_a_real_broadcast(real_broadcasts: Path) -> None:
    first, second = gray_pair(real_broadcasts / "clip8.mp4", 128)
    assert warp_error_ratio(first, second, make_flow_function("dis")(first, second)) < 0.8
