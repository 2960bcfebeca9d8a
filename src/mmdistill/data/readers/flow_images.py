"""Optical flow as two grayscale images per frame pair, as TSN, denseflow and EPIC-Kitchens store it."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdistill.data.motion import flow_magnitude
from mmdistill.data.readers.base import FrameError, FrameFileReader, FrameSizeError, Reader, missing_files
from mmdistill.data.readers.image_file import decode_image

_MAX_CHANNEL_DIFFERENCE = 4  # of a grayscale image that is stored as a color JPEG


class FlowImageReader(Reader):
    """Pairs of JPEG or PNG files: float16 (T, 2, H, W), displacement (x, y) in px of the stored frame.

    Gray 0 is a displacement of -`bound` px, gray 255 one of `bound` px.

    Args:
        root: folder of the files.
        frame_size: (height, width) of the images in px. A file of another size is an error.
        pattern: file name below `root`, with ``{video}``, ``{axis}`` and ``{frame:05d}``.
        frame_number_offset: number of frame 0 in file names.
        bound: displacement in px.
        axes: what replaces ``{axis}`` for the horizontal and the vertical displacement.

    Raises:
        ValueError: the pattern gives the same file to two frames, two videos or two axes.
    """

    name = "flow"

    def __init__(
        self,
        root: Path | str,
        *,
        frame_size: tuple[int, int],
        pattern: str,
        frame_number_offset: int = 0,
        bound: float,
        axes: str = "xy",
    ) -> None:
        if "{axis}" not in pattern:
            raise ValueError(f"{pattern!r} must contain {{axis}}")
        self.bound = bound
        self._readers = [
            _GrayReader(
                root,
                frame_size=frame_size,
                pattern=pattern.replace("{axis}", axis),
                frame_number_offset=frame_number_offset,
            )
            for axis in axes
        ]

    @property
    def settings(self) -> tuple[object, ...]:
        """See `Reader.settings`."""
        return (self.bound,)

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """See `Reader.files`."""
        files = (path for reader in self._readers for path in reader.files(video, frames))
        return list(dict.fromkeys(files))

    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
        """See `Reader.missing_frames`."""
        paths = [[reader.path(video, frame) for reader in self._readers] for frame in frames]
        missing = missing_files([path for axes in zip(*paths, strict=True) for path in axes], self.name)
        return [frame for frame, axes in zip(frames, paths, strict=True) if missing.intersection(axes)]

    def motion_energy(self, clip: np.ndarray) -> np.ndarray:
        """The lengths of the displacements."""
        return flow_magnitude(clip)

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        gray = np.stack([reader.read(video, frames) for reader in self._readers], axis=1)  # (T, 2, H, W)
        levels = (np.arange(256) * (2 * self.bound / 255) - self.bound).astype(np.float16)
        flow: np.ndarray = levels[gray]
        return flow


class _GrayReader(FrameFileReader):
    """Grayscale images of one axis: uint8 (T, H, W)."""

    name = "flow"
    pattern = "{video}/flow_x_{frame:05d}.jpg"

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        out = np.empty((len(frames), *self.frame_size), np.uint8)
        for position, (path, data) in enumerate(self.read_files(video, frames)):
            image = decode_image(path, data, ("JPEG", "PNG"), cv2.IMREAD_UNCHANGED)
            if image.ndim == 3:
                if np.ptp(image[..., :3], axis=2).max() > _MAX_CHANNEL_DIFFERENCE:
                    raise FrameError(f"{path}: a color image, expected a grayscale image of one axis")
                image = image[..., 1]
            if image.dtype != np.uint8:
                raise FrameError(f"{path}: type {image.dtype}, expected 8 bits per pixel")
            if image.shape != self.frame_size:
                found, expected = (" x ".join(map(str, size)) for size in (image.shape, self.frame_size))
                message = f"{path}: {found} px, expected {expected} from data_module.frame_size"
                raise FrameSizeError(message, image.shape)
            out[position] = image
        return out
