"""Skeletons: one pickle file per video."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill.data.readers.base import FrameError, KeypointReader, file_errors
from mmdistill.data.readers.safe_pickle import load_pickle
from mmdistill.errors import format_count

NUM_JOINTS = 17  # COCO
SKELETON_CACHE_BYTES = 64 << 20  # converted files, per reader and process


class SkeletonReader(KeypointReader):
    """Skeleton pickles: float32 (T, M, 17, 3), rows (x, y, score) in px of the stored frame.

    Pixel centers are at integers. A file has keypoints in px of its ``img_shape``; they are scaled to the stored frame.
    M is always `max_persons`: absent persons have score 0. If a file has more persons, those with the largest sums of
    scores are kept, in the order of the file.
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
    ) -> None:
        self.root, self.frame_size = str(root), frame_size
        self.max_persons, self.pattern, self.cache_bytes = max_persons, pattern or "{video}.pkl", cache_bytes
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self.files_read = 0

    def path(self, video: str) -> str:
        """Path of the file of `video`."""
        return f"{self.root}/{self.pattern.format(video=video)}"

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """See `Reader.files`."""
        return [self.path(video)]

    @property
    def settings(self) -> tuple[object, ...]:
        """See `Reader.settings`."""
        return (self.max_persons,)

    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
        """See `Reader.missing_frames`."""
        return [] if os.path.exists(self.path(video)) else list(frames)

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
            raise FrameError(f"{self.path(video)}: keypoint or keypoint_score is not finite at {where}")
        return selected

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

    def _load(self, path: str) -> np.ndarray:
        with file_errors(path, "skeleton"):
            entry = load_pickle(Path(path))
        try:
            joints, scores, (height, width) = parse_skeleton(entry)
        except ValueError as error:
            raise FrameError(f"{path}: {error}") from error
        scale = np.array([self.frame_size[1] / width, self.frame_size[0] / height])
        rows = np.empty((*scores.shape, 3), np.float32)
        rows[..., :2] = (joints + 0.5) * scale - 0.5
        rows[..., 2] = scores
        rows[scores == 0] = 0  # the position of a joint that was not found is undefined
        rows[~np.isfinite(rows).all(axis=-1)] = np.nan
        found = rows.shape[1]
        if found > self.max_persons:
            best = np.argsort(-np.nan_to_num(rows[..., 2]).sum(axis=(0, 2)), kind="stable")[: self.max_persons]
            return rows[:, np.sort(best)]
        return np.pad(rows, ((0, 0), (0, self.max_persons - found), (0, 0), (0, 0)))


def parse_skeleton(entry: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Check the content of a skeleton file.

    Returns:
        keypoints float64 (T, M, 17, 2) in px of the source image, scores float64 (T, M, 17), and (height, width) of the
        source image.

    Raises:
        ValueError: a key is missing or invalid; names it.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"expected a dict, got {type(entry).__name__}")
    for key in ("keypoint", "keypoint_score", "img_shape"):
        if key not in entry:
            raise ValueError(f"the key {key!r} is missing; the file has {', '.join(sorted(map(str, entry)))}")
    try:
        joints = np.asarray(entry["keypoint"], dtype=np.float64)
        scores = np.asarray(entry["keypoint_score"], dtype=np.float64)
        height, width = (int(v) for v in entry["img_shape"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"keypoint, keypoint_score or img_shape are not numbers ({error})") from error
    if joints.ndim == 3:
        joints, scores = joints[None], scores[None]
    if joints.ndim != 4 or joints.shape[2:] != (NUM_JOINTS, 2):
        raise ValueError(f"keypoint has shape {joints.shape}, expected (M, T, 17, 2) or (T, 17, 2)")
    if scores.shape != joints.shape[:3]:
        raise ValueError(f"keypoint_score has shape {scores.shape}, expected {joints.shape[:3]} as in keypoint")
    total = entry.get("total_frames", joints.shape[1])
    if total != joints.shape[1]:
        raise ValueError(f"total_frames={total}, but keypoint has {format_count(joints.shape[1], 'row')}")
    if height < 1 or width < 1:
        raise ValueError(f"img_shape={entry['img_shape']}, expected (height, width)")
    if (scores < 0).any():
        raise ValueError("keypoint_score has negative values")
    return joints.transpose(1, 0, 2, 3), scores.transpose(1, 0, 2), (height, width)
