"""One reader per modality: numbers of frames in, raw arrays out. Nothing is guessed: what cannot be read is an error.

A frame has one number, counted from 0, in all modalities: picture k, the flow from k to k + 1, row k of the skeletons.

Shapes: T frames asked for, H x W stored frame, M persons, 17 COCO joints.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdistill.errors import InputError


class FrameError(InputError):
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
    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
        """Those of `frames` for which there is no file. Looks at names only: a file may still turn out unreadable."""

    @abstractmethod
    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """Paths of the files that `read` opens, each once, whether they are there or not."""

    @property
    def settings(self) -> tuple[object, ...]:
        """What else decides the arrays, besides the files and the stored frame's size."""
        return ()

    def read_with_repeats(self, video: str, frames: Sequence[int]) -> tuple[np.ndarray, list[int]]:
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


class KeypointReader(Reader):
    """A modality with one file of keypoints per video."""

    @abstractmethod
    def path(self, video: str) -> str:
        """Path of the file of `video`."""

    @abstractmethod
    def load_video(self, video: str) -> np.ndarray:
        """All rows of a video, (T, M, J, 3); NaN where a keypoint with a score is not finite. Raises `FrameError`."""


class _FileReader(Reader):
    """A modality with one file per frame."""

    pattern: str

    def __init__(
        self, root: Path | str, *, frame_size: tuple[int, int], pattern: str | None = None, frame_number_offset: int = 0
    ) -> None:
        """Args:
        root: the modality's folder.
        frame_size: stored (height, width) in px; another size is an error.
        pattern: file name under `root` with ``{video}`` and ``{frame:06d}``.
        frame_number_offset: the number in the name of frame 0's file.

        Raises `ValueError` for a pattern that gives two frames, or two videos, the same file.
        """
        self.root, self.frame_size = str(root), frame_size
        self.pattern = pattern or self.pattern
        self.frame_number_offset = frame_number_offset
        if not is_unique_frame_pattern(self.pattern):
            raise ValueError(f"{self.pattern!r} must contain {{video}} and {{frame}}, like {type(self).pattern!r}")

    def path(self, video: str, frame: int) -> str:
        """Where the file of `frame` lies."""
        return f"{self.root}/{self.pattern.format(video=video, frame=frame + self.frame_number_offset)}"

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        return [self.path(video, k) for k in frames]

    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
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


def is_unique_frame_pattern(pattern: str) -> bool:
    """Whether a pattern of file names, with ``{video}`` and ``{frame:06d}``, gives each frame of each video its own."""
    try:
        return len({pattern.format(video=video, frame=frame) for video in "ab" for frame in (1, 2)}) == 4
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        return False
