"""COCO-17 skeletons of two players: estimated by a pose network, or read from a file.

`find_players` locates the players. A pose network then estimates the joints in a crop of each, at source resolution:
MediaPipe BlazePose (this module) or ViTPose (`prepare.vitpose`). Both are optional extras and are imported only when
they are requested.
"""

import functools
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.errors import InputError, format_count
from mmdistill.files import atomic_write_bytes
from mmdistill.prepare.contact_sheet import ContactSheet
from mmdistill.prepare.placement import Placement
from mmdistill.prepare.player_tracking import ReadFrames, find_players, square_crops
from mmdistill.prepare.video import Frame

# BlazePose landmark of each COCO joint: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
BLAZEPOSE_TO_COCO = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)

HIPS = (11, 12)
MAX_HIP_OFFSET = 0.3  # crop sides between the crop center and the hips; a larger offset means another person
# A far player is 80 px high in a 1080-line broadcast. Measured on one video: found in 9 of 21 frames without
# enlargement, in 19 with the crop enlarged to twice the player's size.
ENLARGE_BELOW, ENLARGED_SIDE = 320, 512  # px

BATCH_FRAMES = 8  # frames per call of a pose estimator

PoseFunction = Callable[[np.ndarray], np.ndarray | None]
# B frames, uint8 (H, W, 3) BGR, and the crops of the near and the far player in them, (2, B, 3) as `square_crops`
# returns them, NaN: no crop -> float32 (2, B, 17, 3): x and y in source px (pixel centers at integers), and the score
PoseEstimator = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]


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
def load_mediapipe() -> PoseEstimator:
    """The estimator of MediaPipe, loaded once per process.

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

    return estimate_in_crops(estimate_pose)


def estimate_in_crops(pose: PoseFunction) -> PoseEstimator:
    """The estimator that calls `pose` with each crop.

    `pose` gets uint8 (S, S, 3) RGB and returns float32 (17, 3): x and y as fractions of the crop, and the score; or
    None if no person is found.
    """

    def estimate(frames: Sequence[np.ndarray], crops: np.ndarray) -> np.ndarray:
        rows = np.zeros((*crops.shape[:2], 17, 3), np.float32)
        for person, k in zip(*np.nonzero(~np.isnan(crops[..., 0])), strict=True):
            rows[person, k] = _estimate_joints(frames[k], crops[person, k], pose)
        return rows

    return estimate


def write_skeletons(
    read: ReadFrames,
    target: Path,
    sheet: Path,
    *,
    split: float,
    pose: PoseEstimator,
    place: Placement | None = None,
) -> SkeletonCounts:
    """Write the skeletons of a video: person 0 near, person 1 far; score 0 where a person is absent, never NaN.

    Args:
        read: yields the frames of the video.
        target: the skeleton file.
        sheet: a JPEG of evenly spaced frames with the drawn skeletons.
        split: see `find_players`.
        pose: estimates the joints of both players.
        place: the keypoints are written in px of the stored frame; None: in px of the source.

    Raises:
        VideoError: the video cannot be decoded.
    """
    players = find_players(read, split=split)
    crops = np.stack([square_crops(boxes) for boxes in players.boxes])  # (2, T, 3)
    rows = np.zeros((*crops.shape[:2], 17, 3), np.float32)
    drawing, shape = ContactSheet(rows.shape[1]), (0, 0)
    for batch in _batches(read(), BATCH_FRAMES):
        first, end = batch[0].number, batch[-1].number + 1
        rows[:, first:end] = pose([frame.pixels for frame in batch], crops[:, first:end])
        for frame in batch:
            drawing.add(frame.number, frame.pixels, rows[:, frame.number])
        shape = batch[0].pixels.shape[:2]
    near, far = _write(target, rows, shape, place)
    drawing.write(sheet)
    return SkeletonCounts(rows.shape[1], near, far, int(players.camera_moves.sum()), *players.person_changes)


def copy_skeletons(
    read: ReadFrames, source: Path, target: Path, sheet: Path, place: Placement | None = None
) -> SkeletonCounts:
    """Write the skeletons of `source`, FOLDER/{video}.pkl, with row k of frame k, and their contact sheet.

    Of a file with more than two persons, the two with the largest sums of scores are used. The other arguments are
    those of `write_skeletons`.

    Raises:
        FrameError: the file cannot be read or has values that are not finite.
        PoseError: it has another number of rows than the video has frames.
        VideoError: the video cannot be decoded.
    """
    total, shape = 0, (0, 0)
    for frame in read():
        total, shape = frame.number + 1, frame.pixels.shape[:2]
    reader = SkeletonReader(source.parent, frame_size=shape)
    if (found := len(reader.load_video(source.stem))) != total:
        raise PoseError(f"{source}: {format_count(found, 'row')}, but the video has {format_count(total, 'frame')}")
    rows = reader.read(source.stem, range(total)).transpose(1, 0, 2, 3)
    drawing = ContactSheet(total)
    for frame in read():
        drawing.add(frame.number, frame.pixels, rows[:, frame.number])
    near, far = _write(target, rows, shape, place)
    drawing.write(sheet)
    return SkeletonCounts(total, near, far, 0, [], [])


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Lists of `size` frames; the last one may be shorter."""
    iterator = iter(frames)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _write(target: Path, rows: np.ndarray, shape: tuple[int, int], place: Placement | None) -> tuple[int, int]:
    """Write rows (2, T, 17, 3) in px of a source of this shape.

    Returns:
        the numbers of frames with a near and with a far player.
    """
    if place is not None:
        rows, shape = place.place_joints(rows, shape), place.stored
    entry = {
        "frame_dir": target.stem,
        "keypoint": rows[..., :2],
        "keypoint_score": rows[..., 2],
        "total_frames": rows.shape[1],
        "img_shape": tuple(int(v) for v in shape),
    }
    atomic_write_bytes(target, pickle.dumps(entry, protocol=4))
    near, far = (rows[..., 2] > 0).any(axis=2).sum(axis=1).tolist()
    return near, far


def cut_crop(pixels: np.ndarray, crop: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """A square (left, top, side) of a BGR image, as RGB, and its upper left corner (x, y) in whole px.

    Outside the image, border pixels are repeated.
    """
    left, top, side = (round(float(v)) for v in crop)
    side = max(side, 1)
    height, width = pixels.shape[:2]
    ys, xs = (np.arange(side) + top).clip(0, height - 1), (np.arange(side) + left).clip(0, width - 1)
    return np.ascontiguousarray(pixels[np.ix_(ys, xs)][..., ::-1]), (left, top)


def _estimate_joints(pixels: np.ndarray, crop: np.ndarray, pose: PoseFunction) -> np.ndarray:
    """(17, 3): x and y in source px (pixel centers at integers), and score; zeros if no person is found."""
    image, corner = cut_crop(pixels, crop)
    side = len(image)
    if side < ENLARGE_BELOW:
        image = cv2.resize(image, (ENLARGED_SIDE, ENLARGED_SIDE), interpolation=cv2.INTER_CUBIC)
    joints = pose(image)
    if joints is None or not np.isfinite(joints).all():
        return np.zeros((17, 3), np.float32)
    if np.abs(joints[HIPS, :2].mean(axis=0) - 0.5).max() > MAX_HIP_OFFSET:
        return np.zeros((17, 3), np.float32)
    joints = joints.copy()
    joints[:, :2] = joints[:, :2] * side + corner - 0.5
    joints[:, 2] = joints[:, 2].clip(0, 1)
    return joints
