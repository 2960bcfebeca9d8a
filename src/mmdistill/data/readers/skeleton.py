"""Skeletons: one pickle or .npy file per video."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill.console import log_once
from mmdistill.data.readers.base import FrameError, KeypointReader, file_errors, outside_share
from mmdistill.data.readers.npy_file import load_npy
from mmdistill.data.readers.safe_pickle import load_pickle
from mmdistill.data.readers.skeleton_format import SkeletonFormat
from mmdistill.errors import format_count

SKELETON_CACHE_BYTES = 64 << 20  # converted files, per reader and process
SCORE_TOLERANCE = 1e-3  # of float16 scores
MAX_OUTSIDE_SHARE = 0.5  # of joints that may lie outside the image
MAX_FRACTION_OUTSIDE = 0.25  # image sizes by which a joint in fractions of the image lies outside of it
REPORTED_OUTSIDE_SHARE = 0.01  # a person at the border of the image has a few joints outside of it


class SkeletonReader(KeypointReader):
    """Skeleton files: float32 (T, M, J, 3), rows (x, y, score) in px of the stored frame. J is 17 for COCO.

    Pixel centers are at integers. A file has keypoints in px of its ``img_shape``; they are scaled to the stored frame.
    M is always `max_persons`: absent persons have score 0. If a file has more persons, those with the largest sums of
    scores are kept, in the order of the file. Optional keys, joint layouts and checks: see `parse_skeleton`. A file is
    an error if most of its joints lie outside the image. The first file with more than 1 % of them outside is logged.

    `extra` reads further keypoints. They follow the joints of the first person; the other persons have score 0 there.
    """

    name = "skeleton"

    def __init__(
        self,
        root: Path | str,
        *,
        frame_size: tuple[int, int],
        max_persons: int = 2,
        pattern: str | None = None,
        cache_bytes: int = SKELETON_CACHE_BYTES,
        file_format: SkeletonFormat | None = None,
        extra: KeypointReader | None = None,
    ) -> None:
        self.root, self.frame_size, self.file_format = str(root), frame_size, file_format or SkeletonFormat()
        self.max_persons, self.pattern, self.cache_bytes = max_persons, pattern or "{video}.pkl", cache_bytes
        self.extra = extra
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._num_persons: dict[str, int] = {}  # in the file of each path that was read
        self.files_read = 0

    def path(self, video: str) -> str:
        """Path of the file of `video`."""
        return f"{self.root}/{self.pattern.format(video=video)}"

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """See `Reader.files`."""
        return [self.path(video), *(self.extra.files(video, frames) if self.extra else [])]

    @property
    def settings(self) -> tuple[object, ...]:
        """See `Reader.settings`."""
        extra = self.extra.settings if self.extra else ()
        return (self.max_persons, *([] if self.file_format == SkeletonFormat() else [self.file_format]), *extra)

    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
        """See `Reader.missing_frames`."""
        return [] if all(map(os.path.exists, self.files(video, frames))) else list(frames)

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        rows = self.load_video(video)
        missing = [k for k in frames if not 0 <= k < len(rows)]
        if missing:
            raise FrameError(
                f"{self.path(video)}: no row for frame {missing[0]}, the file has {format_count(len(rows), 'row')}"
            )
        selected = rows[list(frames)]
        if np.isnan(selected).any():
            k, m, j = np.argwhere(np.isnan(selected).any(axis=-1))[0]
            where = f"frame {frames[k]}, person {m}, joint {j}"
            raise FrameError(
                f"{self.path(video)}: keypoint or keypoint_score is not finite at {where}; write score 0 for a "
                "joint that was not found"
            )
        if self.extra is None:
            return selected
        more = np.pad(self.extra.read(video, frames), ((0, 0), (0, self.max_persons - 1), (0, 0), (0, 0)))
        return np.concatenate((selected, more), axis=2)

    def load_video(self, video: str) -> np.ndarray:
        """See `KeypointReader.load_video`."""
        path = self.path(video)
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        rows = self._load(path)
        self.files_read += 1
        self._cache[path] = rows
        self._cached_bytes += rows.nbytes
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return rows

    def num_persons(self, video: str) -> int:
        """See `KeypointReader.num_persons`."""
        self.load_video(video)
        return self._num_persons[self.path(video)]

    def _load(self, path: str) -> np.ndarray:
        with file_errors(path, self.name):
            entry = load_npy(path, Path(path).read_bytes()) if path.endswith(".npy") else load_pickle(Path(path))
        try:
            joints, scores, (height, width) = parse_skeleton(entry, self.file_format, self.frame_size)
        except ValueError as error:
            raise FrameError(f"{path}: {error}") from error
        scale = np.array([self.frame_size[1] / width, self.frame_size[0] / height])
        rows = np.empty((*scores.shape, 3), np.float32)
        rows[..., :2] = (joints + 0.5) * scale - 0.5
        rows[..., 2] = scores
        rows[scores == 0] = 0  # the position of a joint that was not found is undefined
        rows[~np.isfinite(rows).all(axis=-1)] = np.nan
        self._check_inside(path, rows, (height, width))
        found = self._num_persons[path] = rows.shape[1]
        if found > self.max_persons:
            best = np.argsort(-np.nan_to_num(rows[..., 2]).sum(axis=(0, 2)), kind="stable")[: self.max_persons]
            return rows[:, np.sort(best)]
        return np.pad(rows, ((0, 0), (0, self.max_persons - found), (0, 0), (0, 0)))

    def _check_inside(self, path: str, rows: np.ndarray, img_shape: tuple[int, int]) -> None:
        share = outside_share(rows, self.frame_size)
        size = f"{img_shape[0]} x {img_shape[1]} px (height x width)"
        message = f"{path}: {100 * share:.1f} % of the joints with a score lie outside the image of {size}"
        if share > MAX_OUTSIDE_SHARE:
            key = f"{self.file_format.key}img_shape"
            raise FrameError(f"{message}; correct img_shape, or {key} if the file has none")
        if share > REPORTED_OUTSIDE_SHARE:
            text = f"{message}; only the first such file is logged, `mmdistill check-data` lists all"
            log_once(text, key=f"{self.root}: joints outside the image")


class ExtraKeypointReader(SkeletonReader):
    """Keypoints besides the skeletons, such as ball and court corners: float32 (T, 1, K, 3), as of `SkeletonReader`."""

    name = "extra keypoint"

    def _load(self, path: str) -> np.ndarray:
        rows = super()._load(path)
        if (persons := self._num_persons[path]) > 1:
            raise FrameError(f"{path}: {persons} persons, expected one: an array (frames, keypoints, 3)")
        return rows


def parse_skeleton(
    entry: Any, file_format: SkeletonFormat, frame_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Check the content of a skeleton file and select the joints of the format.

    The content is a dict with the key ``keypoint``, or the array of this key alone. A file without scores has score 1
    for joints with finite coordinates other than (0, 0), which pose networks write for a joint that was not found. A
    file without an image size has that of `file_format`, else `frame_size`. The log reports both once.

    Returns:
        keypoints float64 (T, M, J, 2) in px of the source image, scores float64 (T, M, J) in [0, 1], and
        (height, width) of the source image.

    Raises:
        ValueError: a key is missing or invalid, a score is not in [0, 1], or the joints do not lie in the image; names
            the key.
    """
    if isinstance(entry, list) and len(entry) == 1:
        (entry,) = entry
    if isinstance(entry, np.ndarray):
        entry = {"keypoint": entry}
    if isinstance(entry, list) or (isinstance(entry, dict) and "annotations" in entry):
        raise ValueError("skeletons of several videos; `mmdistill convert-skeletons` writes one file per video")
    if not isinstance(entry, dict):
        raise ValueError(f"expected a dict, got {type(entry).__name__}")
    if "keypoint" not in entry:
        raise ValueError(f"the key 'keypoint' is missing; the file has {', '.join(sorted(map(str, entry)))}")
    try:
        joints = np.asarray(entry["keypoint"], dtype=np.float64)
        stored = entry.get("keypoint_score")
        scores: Any = None if stored is None else np.asarray(stored, dtype=np.float64)
        height, width = _image_size(entry, file_format, frame_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"keypoint, keypoint_score or img_shape are not numbers ({error})") from error
    if joints.ndim == 3:
        joints, scores = joints[None], None if scores is None else scores[None]
    if joints.ndim != 4 or joints.shape[3] not in (2, 3):
        raise ValueError(
            f"keypoint has shape {joints.shape}, expected (M, T, J, 2) or (T, J, 2), or triples (x, y, score)"
        )
    if joints.shape[3] == 3:
        if scores is not None:
            raise ValueError(
                f"keypoint has shape {joints.shape}: triples (x, y, score) besides keypoint_score; remove the key "
                "keypoint_score, or the third value of each joint"
            )
        joints, scores = joints[..., :2], joints[..., 2]
    try:
        positions = file_format.joint_positions(joints.shape[2])
    except ValueError as error:
        raise ValueError(f"keypoint has shape {joints.shape}: {error}") from error
    if scores is None:
        log_once("skeleton files without keypoint_score: joints with finite coordinates other than (0, 0) have score 1")
        scores = (np.isfinite(joints).all(axis=-1) & joints.any(axis=-1)).astype(np.float64)
    if scores.shape != joints.shape[:3]:
        raise ValueError(f"keypoint_score has shape {scores.shape}, expected {joints.shape[:3]} as in keypoint")
    total = entry.get("total_frames", joints.shape[1])
    if total != joints.shape[1]:
        raise ValueError(
            f"total_frames={total}, but keypoint has {format_count(joints.shape[1], 'row')}: its shape is "
            f"{joints.shape[:3]}, expected (persons, frames, joints)"
        )
    if height < 1 or width < 1:
        raise ValueError(f"img_shape={entry.get('img_shape')}, expected (height, width)")
    joints, scores = joints[:, :, positions], scores[:, :, positions] / file_format.score_max
    _check_scores(scores, file_format)
    is_found = (scores > 0) & np.isfinite(joints).all(axis=-1)
    _check_coordinates("keypoint", joints[is_found], (height, width))
    for number in np.flatnonzero(is_found.sum(axis=(1, 2)) >= len(positions)).tolist():
        _check_coordinates(f"keypoint of person {number}", joints[number][is_found[number]], (height, width))
    return joints.transpose(1, 0, 2, 3), np.minimum(scores, 1).transpose(1, 0, 2), (height, width)


def _image_size(entry: dict[str, Any], file_format: SkeletonFormat, frame_size: tuple[int, int]) -> tuple[int, int]:
    stored = entry.get("img_shape")
    if stored is not None:
        if isinstance(stored, str | bytes):
            raise ValueError(f"img_shape={stored!r} is text, expected (height, width)")
        height, width = (int(v) for v in tuple(stored)[:2])  # a third value is the number of channels
        return height, width
    size = file_format.img_shape or frame_size
    key = "data_module.frame_size" if file_format.img_shape is None else f"{file_format.key}img_shape"
    log_once(f"skeleton files without img_shape: their image is {size[0]} x {size[1]} px, from {key}")
    return size


def _check_scores(scores: np.ndarray, file_format: SkeletonFormat) -> None:
    if (scores < 0).any():
        raise ValueError("keypoint_score has negative values")
    largest = float(np.fmax.reduce(scores, axis=None, initial=0.0)) * file_format.score_max
    if largest > file_format.score_max * (1 + SCORE_TOLERANCE):
        raise ValueError(
            f"keypoint_score has values up to {largest:.4g}, expected 0 to {file_format.score_max:g}; set "
            f"{file_format.key}score_max to the largest possible score, for example 100 for percentages"
        )


def _check_coordinates(name: str, joints: np.ndarray, img_shape: tuple[int, int]) -> None:
    """`joints` are those of `name` with a score, (N, 2) in px. Fractions of the image are 0 to 1 or -1 to 1."""
    if not len(joints) or np.abs(joints).max() > 2 or max(img_shape) <= 2 or not (joints % 1).any():
        return
    low, fix = 0, "multiply by the image's width and height"
    if joints.min() < -MAX_FRACTION_OUTSIDE:
        low, fix = -1, "replace x by (x + 1) / 2 * width and y by (y + 1) / 2 * height"
    raise ValueError(f"{name} has values from {low} to 1, but must be in px: {fix}")
