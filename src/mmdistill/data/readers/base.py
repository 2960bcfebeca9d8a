"""The interface of readers. A reader turns frame numbers into raw arrays of one modality.

A frame has the same number, counted from 0, in all modalities: image k, the flow from frame k to k + 1, row k of the
skeletons. A reader never guesses: a frame that cannot be read raises `FrameError`.

Shapes: T requested frames, H x W stored frame, M persons, J joints.
"""

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from mmdistill.data.motion import joint_displacement
from mmdistill.data.readers.zip_file import ZIP_NAME, ZipError, read_zip, zip_names
from mmdistill.errors import InputError


class FrameError(InputError):
    """A frame that is missing or cannot be read. The message names the file and the problem.

    It takes the message as its only argument, because loader workers rebuild the exception from it.
    """


class MissingFileError(FrameError):
    """The file of a frame does not exist."""


class FrameSizeError(FrameError):
    """A frame of another size than that of the reader. `size`: its (height, width) in px; None: unknown."""

    def __init__(self, message: str, size: tuple[int, ...] | None = None) -> None:
        super().__init__(message)
        self.size = size


@contextmanager
def file_errors(path: str, kind: str) -> Iterator[None]:
    """Convert an error of the operating system to a `FrameError` about the file of `kind`, for example ``rgb``."""
    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such {kind} file") from None
    except OSError as error:
        raise FrameError(f"{path}: {error.strerror}") from error
    except ZipError as error:
        raise FrameError(str(error)) from error


class Reader(ABC):
    """Reads one modality of any video."""

    name: str  # name of the modality

    @abstractmethod
    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """The raw array of these frames, (T, ...), in the given order.

        Raises:
            FrameError: a frame cannot be read; names the first one.
        """

    @abstractmethod
    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
        """The frames that have no file. Files are not opened, so the others may still be unreadable.

        Raises:
            FrameError: one file contains all frames, and it is truncated or damaged; names it.
        """

    @abstractmethod
    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """Paths of the files that `read` opens, each once, whether they exist or not."""

    def motion_energy(self, clip: np.ndarray) -> np.ndarray:
        """How much moves at each pixel of an array that `read` returned, float32 (T, H, W); see `data.motion`.

        Raises:
            NotImplementedError: the modality defines none.
        """
        raise NotImplementedError(f"{self.name} defines no motion energy")

    @property
    def settings(self) -> tuple[object, ...]:
        """Options that change the arrays, besides the files and the size of the stored frame."""
        return ()

    def read_with_repeats(self, video: str, frames: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Like `read`, but replace an unreadable frame by the nearest readable one (the earlier one in a tie).

        Returns:
            The array, (T, ...), and the numbers of the replaced frames.

        Raises:
            FrameError: no frame can be read.
        """
        try:
            return self.read(video, frames), []
        except FrameError as error:
            first_error = error
        readable: dict[int, np.ndarray] = {}
        for position, frame in enumerate(frames):
            with suppress(FrameError):
                readable[position] = self.read(video, [frame])[0]
        if not readable:
            raise first_error
        nearest = [min((abs(r - p), r) for r in readable)[1] for p in range(len(frames))]
        return np.stack([readable[r] for r in nearest]), [f for p, f in enumerate(frames) if p not in readable]


class KeypointReader(Reader):
    """Reader of a modality with one keypoint file per video."""

    frame_size: tuple[int, int]  # (height, width) of the stored frames in px
    max_persons: int  # M of the rows
    extra: "KeypointReader | None" = None  # of further keypoints, which `read` adds and `load_video` does not

    @abstractmethod
    def path(self, video: str) -> str:
        """Path of the file of `video`."""

    def motion_energy(self, clip: np.ndarray) -> np.ndarray:
        """The distances that joints move; see `joint_displacement`."""
        return joint_displacement(clip, self.frame_size)

    @abstractmethod
    def load_video(self, video: str) -> np.ndarray:
        """All rows of a video, float32 (T, M, J, 3). A keypoint with a score that is not finite is NaN.

        Raises:
            FrameError: the file cannot be read.
        """

    def num_persons(self, video: str) -> int:
        """The number of persons in the file of `video`, of which at most `max_persons` are used.

        Raises:
            FrameError: the file cannot be read.
        """
        return int(self.load_video(video).shape[1])


def outside_share(rows: np.ndarray, frame_size: tuple[int, int]) -> float:
    """The fraction of the joints with a score that lie outside the frame of (height, width) px.

    `rows` are (..., 3), (x, y, score) in px with pixel centers at integers.
    """
    x, y, score = np.moveaxis(rows, -1, 0)
    found = score > 0
    is_inside = (x >= -0.5) & (x <= frame_size[1] - 0.5) & (y >= -0.5) & (y <= frame_size[0] - 0.5)
    return float((found & ~is_inside).sum() / max(found.sum(), 1))


class FrameFileReader(Reader):
    """Reader of a modality with one file per frame. A folder may contain ``frames.zip`` in place of its files.

    Args:
        root: folder of the modality.
        frame_size: (height, width) of the stored frames in px. A file of another size is an error.
        pattern: file name below `root`, with ``{video}`` and ``{frame:06d}``; None: the default of the class.
        frame_number_offset: number of frame 0 in file names.

    Raises:
        ValueError: the pattern gives the same file to two frames or two videos.
    """

    pattern: str

    def __init__(
        self, root: Path | str, *, frame_size: tuple[int, int], pattern: str | None = None, frame_number_offset: int = 0
    ) -> None:
        self.root, self.frame_size = str(root), frame_size
        self.pattern = pattern or self.pattern
        self.frame_number_offset = frame_number_offset
        if not is_unique_frame_pattern(self.pattern):
            raise ValueError(f"{self.pattern!r} must contain {{video}} and {{frame}}, like {type(self).pattern!r}")

    def path(self, video: str, frame: int) -> str:
        """Path of the file of `frame`."""
        return f"{self.root}/{self.pattern.format(video=video, frame=frame + self.frame_number_offset)}"

    def read_files(self, video: str, frames: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """The path, for messages, and the content of the file of each frame.

        Raises:
            FrameError: a file is missing, or its ``frames.zip`` is truncated or damaged.
        """
        for folder, names in _by_folder(self.path(video, k) for k in frames):
            archive = f"{folder}/{ZIP_NAME}"
            if not os.path.exists(archive):
                for name in names:
                    with file_errors(f"{folder}/{name}", self.name):
                        data = Path(folder, name).read_bytes()
                    yield f"{folder}/{name}", data
                continue
            with file_errors(archive, self.name):
                contents = read_zip(archive, names)
            for name, content in zip(names, contents, strict=True):
                if content is None:
                    raise MissingFileError(f"{archive}: contains no {self.name} file {name}")
                yield f"{archive}/{name}", content

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """See `Reader.files`."""
        files: list[str] = []
        for folder, names in _by_folder(self.path(video, k) for k in frames):
            archive = f"{folder}/{ZIP_NAME}"
            files += [archive] if os.path.exists(archive) else [f"{folder}/{name}" for name in names]
        return list(dict.fromkeys(files))

    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
        """See `Reader.missing_frames`."""
        paths = [self.path(video, k) for k in frames]
        missing = missing_files(paths, self.name)
        return [k for k, path in zip(frames, paths, strict=True) if path in missing]


def _by_folder(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Consecutive paths of one folder: the folder and the file names."""
    split = (path.rpartition("/") for path in paths)
    for folder, group in itertools.groupby(split, lambda parts: parts[0]):
        yield folder, [name for _, _, name in group]


def missing_files(paths: Sequence[str], kind: str) -> set[str]:
    """The paths that do not exist, also not in the ``frames.zip`` of their folder.

    Each folder is listed once, which is much faster than a stat per file.

    Raises:
        FrameError: a ``frames.zip`` is truncated or damaged.
    """
    by_folder: dict[str, list[str]] = {}
    for folder, names in _by_folder(paths):
        by_folder.setdefault(folder, []).extend(names)
    missing: set[str] = set()
    for folder, names in by_folder.items():
        existing = list_files(folder, kind)
        missing.update(f"{folder}/{name}" for name in names if name not in existing)
    return missing


def list_files(folder: str, kind: str) -> frozenset[str]:
    """The names of the files in a folder or in its ``frames.zip``; none if there is no such folder.

    Raises:
        FrameError: the ``frames.zip`` is truncated or damaged.
    """
    try:
        names = frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    if ZIP_NAME not in names:
        return names
    archive = f"{folder}/{ZIP_NAME}"
    with file_errors(archive, kind):
        return zip_names(archive)


def is_unique_frame_pattern(pattern: str) -> bool:
    """Whether a pattern with ``{video}`` and ``{frame:06d}`` gives every frame of every video its own file name."""
    try:
        return len({pattern.format(video=video, frame=frame) for video in "ab" for frame in (1, 2)}) == 4
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        return False
