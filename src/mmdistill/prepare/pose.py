"""COCO-17 skeletons of two players, estimated by MediaPipe BlazePose on crops at source resolution.

MediaPipe is an optional extra. It is imported only when skeletons are requested.
"""

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdistill.errors import InputError
from mmdistill.files import atomic_write_bytes
from mmdistill.prepare.placement import Placement
from mmdistill.prepare.player_tracking import ReadFrames, find_players, square_crops

# BlazePose landmark of each COCO joint: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
BLAZEPOSE_TO_COCO = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)

HIPS = (11, 12)
LIMBS = ((5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16))
COLORS = ((60, 60, 255), (255, 160, 0))  # BGR of the near and the far player in a contact sheet: red, blue
SHEET_COLUMNS, SHEET_ROWS, TILE_HEIGHT = 3, 4, 270  # of a contact sheet; height in px
MAX_HIP_OFFSET = 0.3  # crop sides between the crop center and the hips; a larger offset means another person
# A far player is 80 px high in a 1080-line broadcast. Measured on one video: found in 9 of 21 frames without
# enlargement, in 19 with the crop enlarged to twice the player's size.
ENLARGE_BELOW, ENLARGED_SIDE = 320, 512  # px

PoseFunction = Callable[[np.ndarray], np.ndarray | None]


class PoseError(InputError):
    """The pose extra is missing or does not work. The message says what to install."""


@dataclass(frozen=True)
class SkeletonCounts:
    """Number of frames, of frames in which the near and the far player have a skeleton, and of camera motion.

    `near_changes` and `far_changes` are the `person_changes` of `PlayerBoxes`.
    """

    frames: int
    near: int
    far: int
    camera_moves: int
    near_changes: list[int]
    far_changes: list[int]


def import_mediapipe() -> Any:
    """MediaPipe's class ``Pose``.

    Raises:
        PoseError: MediaPipe is not installed.
    """
    try:
        from mediapipe.python.solutions.pose import Pose
    except ImportError as error:
        raise PoseError(
            f"--skeleton mediapipe needs the pose extra ({error}): pip install --no-deps mediapipe==0.10.21, then "
            "pip install 'protobuf>=6.31,<7' absl-py attrs flatbuffers; or use --skeleton none"
        ) from error
    return Pose


@functools.cache  # a match has hundreds of rallies
def load_mediapipe_pose() -> PoseFunction:
    """A function that estimates the pose in an RGB crop, uint8 (S, S, 3).

    It returns float32 (17, 3): x and y as fractions of the crop, and the score; or None if no person is found.

    Raises:
        PoseError: MediaPipe is not installed.
    """
    model = import_mediapipe()(static_image_mode=True, model_complexity=1)  # "full", the only weights in the package

    def estimate_pose(crop: np.ndarray) -> np.ndarray | None:
        landmarks = model.process(crop).pose_landmarks
        if landmarks is None:
            return None
        selected = [landmarks.landmark[i] for i in BLAZEPOSE_TO_COCO]
        return np.array([(m.x, m.y, m.visibility) for m in selected], np.float32)

    return estimate_pose


def write_skeletons(
    read: ReadFrames,
    target: Path,
    sheet: Path,
    *,
    split: float,
    pose: PoseFunction,
    place: Placement | None = None,
) -> SkeletonCounts:
    """Write the skeletons of a video: person 0 near, person 1 far; score 0 where a person is absent, never NaN.

    Args:
        read: yields the frames of the video.
        target: the skeleton file.
        sheet: a JPEG of evenly spaced frames with the drawn skeletons.
        split: see `find_players`.
        pose: estimates the pose in a crop, see `load_mediapipe_pose`.
        place: the keypoints are written in px of the stored frame; None: in px of the source.

    Raises:
        VideoError: the video cannot be decoded.
    """
    players = find_players(read, split=split)
    crops = np.stack([square_crops(boxes) for boxes in players.boxes])  # (2, T, 3)
    total = crops.shape[1]
    rows = np.zeros((2, total, 17, 3), np.float32)
    shape = (0, 0)
    shown = set(np.linspace(0, total - 1, SHEET_COLUMNS * SHEET_ROWS).round().astype(int).tolist())
    tiles = []
    for frame in read():
        shape = frame.pixels.shape[:2]
        for person, crop in enumerate(crops[:, frame.number]):
            if not np.isnan(crop[0]):
                rows[person, frame.number] = _estimate_joints(frame.pixels, crop, pose)
        if frame.number in shown:
            tiles.append(_draw_skeletons(frame.pixels, rows[:, frame.number], f"frame {frame.number}"))
    if place is not None:
        rows, shape = place.place_joints(rows, shape), place.stored
    entry = {
        "frame_dir": target.stem,
        "keypoint": rows[..., :2],
        "keypoint_score": rows[..., 2],
        "total_frames": total,
        "img_shape": tuple(int(v) for v in shape),
    }
    atomic_write_bytes(target, pickle.dumps(entry, protocol=4))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % SHEET_COLUMNS)
    lines = [np.hstack(tiles[k : k + SHEET_COLUMNS]) for k in range(0, len(tiles), SHEET_COLUMNS)]
    atomic_write_bytes(sheet, cv2.imencode(".jpg", np.vstack(lines))[1].tobytes())
    found = (rows[..., 2] > 0).any(axis=2).sum(axis=1)
    return SkeletonCounts(total, int(found[0]), int(found[1]), int(players.camera_moves.sum()), *players.person_changes)


def _draw_skeletons(pixels: np.ndarray, rows: np.ndarray, title: str) -> np.ndarray:
    """A frame with its skeletons (2, 17, 3), reduced to `TILE_HEIGHT`."""
    scale = TILE_HEIGHT / pixels.shape[0]
    tile: np.ndarray = cv2.resize(pixels, (round(pixels.shape[1] * scale), TILE_HEIGHT), interpolation=cv2.INTER_AREA)
    for joints, color in zip(rows, COLORS, strict=True):
        points = ((joints[:, :2] + 0.5) * scale).round().astype(int).tolist()
        for a, b in LIMBS:
            if joints[a, 2] > 0 and joints[b, 2] > 0:
                cv2.line(tile, points[a], points[b], color, 1, cv2.LINE_AA)
    for color, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):  # white with a dark outline
        cv2.putText(tile, title, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, thickness, cv2.LINE_AA)
    return tile


def _estimate_joints(pixels: np.ndarray, crop: np.ndarray, pose: PoseFunction) -> np.ndarray:
    """(17, 3): x and y in source px (pixel centers at integers), and score; zeros if no person is found."""
    left, top, side = (round(float(v)) for v in crop)
    side = max(side, 1)
    height, width = pixels.shape[:2]
    ys, xs = (np.arange(side) + top).clip(0, height - 1), (np.arange(side) + left).clip(0, width - 1)
    image = np.ascontiguousarray(pixels[np.ix_(ys, xs)][..., ::-1])  # outside the image, border pixels are repeated
    if side < ENLARGE_BELOW:
        image = cv2.resize(image, (ENLARGED_SIDE, ENLARGED_SIDE), interpolation=cv2.INTER_CUBIC)
    joints = pose(image)
    if joints is None or not np.isfinite(joints).all():
        return np.zeros((17, 3), np.float32)
    if np.abs(joints[HIPS, :2].mean(axis=0) - 0.5).max() > MAX_HIP_OFFSET:
        return np.zeros((17, 3), np.float32)
    joints = joints.copy()
    joints[:, :2] = joints[:, :2] * side + (left, top) - 0.5
    joints[:, 2] = joints[:, 2].clip(0, 1)
    return joints
