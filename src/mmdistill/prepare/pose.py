"""Skeletons of two players, by MediaPipe's BlazePose on crops at source resolution, as COCO-17.

MediaPipe is an optional extra and imported only here, when it is asked for.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdistill.errors import InputError
from mmdistill.files import atomic_write_bytes
from mmdistill.prepare.player_tracking import crops, find_players
from mmdistill.prepare.video import decode

# BlazePose's landmark for each COCO joint: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
BLAZEPOSE_TO_COCO = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
METHOD = "MediaPipe BlazePose full on crops at source resolution, mapped to COCO-17; persons found by motion"

HIPS = (11, 12)
OFF_CENTRE = 0.3  # crop sides between the crop's middle and the hips: further away it is somebody else
# A far player is 80 px high in a 1080-line broadcast. Measured on one: found in 9 of 21 frames as it is, in 19 with the
# crop enlarged and twice the player's size.
SMALL_CROP, ENLARGED = 320, 512  # px

PoseFunction = Callable[[np.ndarray], np.ndarray | None]


class PoseError(InputError):
    """The pose extra is not there or cannot work; the message says what to install."""


@dataclass(frozen=True)
class SkeletonCounts:
    """Frames in which the near and the far player have a skeleton."""

    frames: int
    near: int
    far: int


def mediapipe_pose() -> PoseFunction:
    """A function of an RGB crop (S, S, 3) uint8: float32 (17, 3) x, y in [0, 1] of the crop and score, or None.

    Raises `PoseError` where MediaPipe is missing.
    """
    try:
        from mediapipe.python.solutions.pose import Pose
    except ImportError as error:
        raise PoseError(
            f"skeleton=mediapipe needs the pose extra ({error}): pip install --no-deps mediapipe==0.10.21, then "
            "pip install 'protobuf>=6.31,<7' absl-py attrs flatbuffers; or use --skeleton none"
        ) from error
    model: Any = Pose(static_image_mode=True, model_complexity=1)  # "full", the only weights in the package

    def pose(crop: np.ndarray) -> np.ndarray | None:
        found = model.process(crop).pose_landmarks
        if found is None:
            return None
        marks = [found.landmark[i] for i in BLAZEPOSE_TO_COCO]
        return np.array([(m.x, m.y, m.visibility) for m in marks], np.float32)

    return pose


def write_skeletons(video: Path, target: Path, *, split: float, pose: PoseFunction) -> SkeletonCounts:
    """The skeleton file of one video: person 0 near, person 1 far; score 0 where a person is absent, never NaN.

    Raises `VideoError` from decoding.
    """
    windows = np.stack([crops(boxes) for boxes in find_players(video, split=split)])  # (2, T, 3)
    total = windows.shape[1]
    rows = np.zeros((2, total, 17, 3), np.float32)
    shape = (0, 0)
    for frame in decode(video):
        shape = frame.pixels.shape[:2]
        for person in range(2):
            window = windows[person, frame.number]
            if not np.isnan(window[0]):
                rows[person, frame.number] = _joints(frame.pixels, window, pose)
    entry = {
        "frame_dir": target.stem,
        "keypoint": rows[..., :2],
        "keypoint_score": rows[..., 2],
        "total_frames": total,
        "img_shape": tuple(int(v) for v in shape),
    }
    atomic_write_bytes(target, pickle.dumps(entry, protocol=4))
    present = (rows[..., 2] > 0).any(axis=2).sum(axis=1)
    return SkeletonCounts(total, int(present[0]), int(present[1]))


def _joints(pixels: np.ndarray, window: np.ndarray, pose: PoseFunction) -> np.ndarray:
    """(17, 3) x, y in source px (pixel centres whole) and score; zeros without a person."""
    left, top, side = (round(float(v)) for v in window)
    crop = np.ascontiguousarray(_cut(pixels, left, top, max(side, 1))[..., ::-1])
    if side < SMALL_CROP:
        crop = cv2.resize(crop, (ENLARGED, ENLARGED), interpolation=cv2.INTER_CUBIC)
    found = pose(crop)
    if found is None or not np.isfinite(found).all() or np.abs(found[HIPS, :2].mean(axis=0) - 0.5).max() > OFF_CENTRE:
        return np.zeros((17, 3), np.float32)
    found = found.copy()
    found[:, :2] = found[:, :2] * max(side, 1) + (left, top) - 0.5
    found[:, 2] = found[:, 2].clip(0, 1)
    return found


def _cut(pixels: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """A square crop; what lies outside the picture repeats its border."""
    height, width = pixels.shape[:2]
    before = (max(0, -top), max(0, -left))
    after = (max(0, top + side - height), max(0, left + side - width))
    inside = pixels[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
    if inside.size == 0:
        return np.zeros((side, side, 3), np.uint8)
    return cv2.copyMakeBorder(inside, before[0], after[0], before[1], after[1], cv2.BORDER_REPLICATE)
