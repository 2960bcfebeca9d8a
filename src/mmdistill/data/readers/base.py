"""One reader per modality: numbers of frames in, raw arrays out. Nothing is guessed: what cannot be read is an error.

A frame has one number, counted from 0, in all modalities: picture k, the flow from k to k + 1, row k of the skeletons.

Shapes: T frames asked for, H x W stored frame, M persons, 17 COCO joints.
"""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from mmdistill.data.annotations.mmcdfsl import names_each_frame
from mmdistill.data.readers.flow_file import FlowFileError, read_flow
from mmdistill.data.readers.safe_pickle import UnsafePickleError, load_pickle

JOINTS = 17
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PADDING = b"\0\r\n "  # that some writers add after the end
SKELETON_CACHE_BYTES = 64 << 20  # of converted skeleton files, per reader and process


class FrameError(ValueError):
    """A frame that is missing or cannot be read; the message names the file and what is wrong with it.

    One argument only: loader workers rebuild the exception from its message.
    """


class Reader(ABC):
    """Reads one modality of any video."""

    name: str

    @abstractmethod
    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """(T, ...) array of these frames. Raises `FrameError` for the first one that cannot be read."""

    @abstractmethod
    def absent(self, video: str, frames: Sequence[int]) -> list[int]:
        """Those of `frames` for which there is no file. Looks at names only: a file may still turn out unreadable."""

    @abstractmethod
    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """Paths of the files that `read` opens, each once, whether they are there or not."""

    @property
    def settings(self) -> tuple[object, ...]:
        """What else decides the arrays, besides the files and the stored frame's size."""
        return ()

    def read_repeating(self, video: str, frames: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Like `read`, but an unreadable frame is replaced by the nearest readable one (the earlier of two).

        Returns the array and the frames that were replaced. Raises `FrameError` if none can be read.
        """
        try:
            return self.read(video, frames), []
        except FrameError as error:
            first_error = error
        good: dict[int, np.ndarray] = {}
        for position, frame in enumerate(frames):
            try:
                good[position] = self.read(video, [frame])[0]
            except FrameError:
                continue
        if not good:
            raise first_error
        nearest = [min(good, key=lambda g, p=position: (abs(g - p), g)) for position in range(len(frames))]
        return np.stack([good[g] for g in nearest]), [f for p, f in enumerate(frames) if p not in good]


class _FileReader(Reader):
    """A modality with one file per frame."""

    pattern: str

    def __init__(
        self, root: Path | str, *, frame_size: tuple[int, int], pattern: str | None = None, first_number: int = 0
    ) -> None:
        """Args:
        root: the modality's folder.
        frame_size: stored (height, width) in px; another size is an error.
        pattern: file name under `root` with ``{video}`` and ``{frame:06d}``.
        first_number: the number in the name of frame 0's file.

        Raises `ValueError` for a pattern that gives two frames, or two videos, the same file.
        """
        self.root, self.frame_size = str(root), frame_size
        self.pattern = pattern or self.pattern
        self.first_number = first_number
        if not names_each_frame(self.pattern):
            key = "frame_pattern" if self.name == "rgb" else "flow_pattern"
            raise ValueError(
                f"{key}={self.pattern!r} must name a file by {{video}} and {{frame}}, like {type(self).pattern!r}"
            )

    def path(self, video: str, frame: int) -> str:
        """Where the file of `frame` lies."""
        return f"{self.root}/{self.pattern.format(video=video, frame=frame + self.first_number)}"

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        return [self.path(video, k) for k in frames]

    def absent(self, video: str, frames: Sequence[int]) -> list[int]:
        paths = [self.path(video, k).rpartition("/") for k in frames]
        listings = {folder: _listing(folder) for folder in {p[0] for p in paths}}  # far cheaper than a stat per file
        return [k for k, (folder, _, file) in zip(frames, paths, strict=True) if file not in listings[folder]]

    def _bytes(self, path: str) -> bytes:
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise FrameError(f"{path}: no such {self.name} file") from None
        except OSError as error:
            raise FrameError(f"{path}: {error.strerror}") from error


def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


class RgbReader(_FileReader):
    """JPEG frames: uint8 (T, H, W, 3), RGB."""

    name = "rgb"
    pattern = "{video}/{frame:06d}.jpg"

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        height, width = self.frame_size
        out = np.empty((len(frames), height, width, 3), np.uint8)
        for position, frame in enumerate(frames):
            path = self.path(video, frame)
            picture = decode_jpeg(self._bytes(path), path)
            if picture.shape != (height, width, 3):
                found = f"{picture.shape[0]} x {picture.shape[1]}"
                raise FrameError(f"{path}: {found} px, but data_module.frame_size says {height} x {width}")
            cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=out[position])
        return out


def decode_jpeg(data: bytes, path: str) -> np.ndarray:
    """A whole JPEG as uint8 (H, W, 3) BGR.

    OpenCV decodes half a file to a picture of full size with flat grey rows, so the end marker is looked for first.
    Raises `FrameError`.
    """
    if not data:
        raise FrameError(f"{path}: empty file")
    if not data.startswith(JPEG_START):
        raise FrameError(f"{path}: not a JPEG")
    if not data.endswith(JPEG_END) and not data.rstrip(PADDING).endswith(JPEG_END):
        raise FrameError(f"{path}: truncated JPEG ({len(data)} bytes, no end marker)")
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise FrameError(f"{path}: damaged JPEG")
    return picture


class FlowReader(_FileReader):
    """Optical flow: float16 (T, 2, H, W), displacement (x, y) in px of the stored frame."""

    name = "flow"
    pattern = "{video}/pair_{frame:05d}.npy"

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        height, width = self.frame_size
        out = np.empty((len(frames), 2, height, width), np.float16)
        halves = torch.from_numpy(out)
        for position, frame in enumerate(frames):
            path = self.path(video, frame)
            try:
                flow = read_flow(path)
            except FileNotFoundError:
                raise FrameError(f"{path}: no such flow file") from None
            except (FlowFileError, OSError) as error:
                raise FrameError(str(error)) from error
            if flow.shape != (2, height, width):
                raise FrameError(f"{path}: shape {flow.shape}, but data_module.frame_size needs (2, {height}, {width})")
            halves[position].copy_(torch.from_numpy(flow))  # 20 times faster than NumPy's conversion to float16
            if ((out[position].view(np.uint16) & 0x7C00) == 0x7C00).any():  # exponent all ones: infinite or NaN
                raise FrameError(f"{path}: values that are not finite in float16")
        return out


class SkeletonReader(Reader):
    """Skeleton pickles: float32 (T, M, 17, 3), x and y in px of the stored frame (pixel centres whole), score.

    The file has keypoints in px of the ``img_shape`` they were found at; they are scaled to the stored frame. M is
    `max_persons` always: persons that are not there have score 0, and of too many the ones with the largest sum of
    scores are kept, in the file's order.
    """

    name = "skeleton"

    def __init__(
        self,
        root: Path | str,
        *,
        frame_size: tuple[int, int],
        max_persons: int = 2,
        pattern: str = "{video}.pkl",
        cache_bytes: int = SKELETON_CACHE_BYTES,
    ) -> None:
        self.root, self.frame_size = str(root), frame_size
        self.max_persons, self.pattern, self.cache_bytes = max_persons, pattern, cache_bytes
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached = 0
        self.files_read = 0

    def path(self, video: str) -> str:
        """Where the file of `video` lies."""
        return f"{self.root}/{self.pattern.format(video=video)}"

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        return [self.path(video)]

    @property
    def settings(self) -> tuple[object, ...]:
        return (self.max_persons,)

    def absent(self, video: str, frames: Sequence[int]) -> list[int]:
        return [] if os.path.exists(self.path(video)) else list(frames)

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        rows = self.whole(video)
        beyond = [k for k in frames if not 0 <= k < len(rows)]
        if beyond:
            raise FrameError(f"{self.path(video)}: no row for frame {beyond[0]}, it has {len(rows)} rows")
        taken = rows[list(frames)]
        if np.isnan(taken).any():
            k, m, j = np.argwhere(np.isnan(taken).any(axis=-1))[0]
            where = f"frame {frames[k]}, person {m}, joint {j}"
            raise FrameError(f"{self.path(video)}: keypoint or keypoint_score is not finite at {where}")
        return taken

    def whole(self, video: str) -> np.ndarray:
        """All rows of a video; NaN where a keypoint with a score is not finite. Raises `FrameError`."""
        path = self.path(video)
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        rows = self._load(path)
        self.files_read += 1
        self._cache[path] = rows
        self._cached += rows.nbytes
        while self._cached > self.cache_bytes and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return rows

    def _load(self, path: str) -> np.ndarray:
        try:
            entry = load_pickle(Path(path))
        except FileNotFoundError:
            raise FrameError(f"{path}: no such skeleton file") from None
        except (UnsafePickleError, OSError) as error:
            raise FrameError(str(error)) from error
        joints, scores, (height, width) = parse_skeleton(entry, path)
        scale = np.array([self.frame_size[1] / width, self.frame_size[0] / height])
        rows = np.empty((*scores.shape, 3), np.float32)
        rows[..., :2] = (joints + 0.5) * scale - 0.5
        rows[..., 2] = scores
        rows[scores == 0] = 0  # an absent joint has no place, whatever the file says
        rows[~np.isfinite(rows).all(axis=-1)] = np.nan
        return self._fit_persons(rows)

    def _fit_persons(self, rows: np.ndarray) -> np.ndarray:
        """(T, any, 17, 3) -> (T, M, 17, 3)"""
        found = rows.shape[1]
        if found > self.max_persons:
            best = np.argsort(-np.nan_to_num(rows[..., 2]).sum(axis=(0, 2)), kind="stable")[: self.max_persons]
            return rows[:, np.sort(best)]
        return np.pad(rows, ((0, 0), (0, self.max_persons - found), (0, 0), (0, 0)))


def parse_skeleton(entry: Any, path: str) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Check the content of a skeleton file.

    Returns:
        keypoints float64 (T, M, 17, 2) in px of the picture they were found in, scores float64 (T, M, 17), and that
        picture's (height, width).

    Raises:
        FrameError: naming the file and the key.
    """
    if not isinstance(entry, dict):
        raise FrameError(f"{path}: expected a dict, got {type(entry).__name__}")
    for key in ("keypoint", "keypoint_score", "img_shape"):
        if key not in entry:
            keys = ", ".join(sorted(map(str, entry)))
            raise FrameError(f"{path}: the key {key!r} is missing; there are {keys}")
    try:
        joints = np.asarray(entry["keypoint"], dtype=np.float64)
        scores = np.asarray(entry["keypoint_score"], dtype=np.float64)
        height, width = (int(v) for v in entry["img_shape"])
    except (TypeError, ValueError) as error:
        raise FrameError(f"{path}: keypoint, keypoint_score or img_shape are not numbers ({error})") from error
    if joints.ndim == 3:
        joints, scores = joints[None], scores[None]
    if joints.ndim != 4 or joints.shape[2:] != (JOINTS, 2):
        raise FrameError(f"{path}: keypoint has shape {joints.shape}, expected (M, T, 17, 2) or (T, 17, 2)")
    if scores.shape != joints.shape[:3]:
        raise FrameError(f"{path}: keypoint_score has shape {scores.shape}, keypoint needs {joints.shape[:3]}")
    total = entry.get("total_frames", joints.shape[1])
    if total != joints.shape[1]:
        raise FrameError(f"{path}: total_frames={total}, but keypoint has {joints.shape[1]} rows")
    if height < 1 or width < 1:
        raise FrameError(f"{path}: img_shape={entry['img_shape']}, expected (height, width)")
    if (scores < 0).any():
        raise FrameError(f"{path}: keypoint_score has negative values")
    return joints.transpose(1, 0, 2, 3), scores.transpose(1, 0, 2), (height, width)
