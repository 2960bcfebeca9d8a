"""Frames on a page: images of a fixed width, and film strips, as data URIs that need no other file.

A film strip shows frames of one video side by side. A colored border marks one of them, for example the frame of a
stroke. All images are uint8 (H, W, 3), RGB.
"""

import base64
import tempfile
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from mmdistill.data.readers.image_file import decode_image

MARK_COLOR = (230, 159, 0)  # RGB, #E69F00: orange of Okabe and Ito's palette
_BORDER = 2  # px around each frame of a strip; white, or `MARK_COLOR`


def resize_to_width(frame: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The frame with `width` px and its aspect ratio."""
    height = max(1, round(frame.shape[0] * width / frame.shape[1]))
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def film_strip(frames: Sequence[NDArray[np.uint8]], *, marked: int | None = None) -> NDArray[np.uint8]:
    """Frames of one size (H, W) side by side in one image. The frame at position `marked` has an orange border."""
    edges = [(_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0)]
    cells = [np.pad(frame, edges, constant_values=255) for frame in frames]
    if marked is not None:
        cell = np.full_like(cells[marked], MARK_COLOR)
        cell[_BORDER:-_BORDER, _BORDER:-_BORDER] = frames[marked]
        cells[marked] = cell
    return np.concatenate(cells, axis=1)


def encode_jpeg(image: NDArray[np.uint8], *, quality: int = 80) -> bytes:
    """The image as the content of a JPEG file."""
    return _encode(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_webp(image: NDArray[np.uint8], *, quality: int = 75) -> bytes:
    """The image as the content of a WebP file, about half as large as a JPEG file."""
    return _encode(image, ".webp", [cv2.IMWRITE_WEBP_QUALITY, quality])


def _encode(image: NDArray[np.uint8], suffix: str, options: Sequence[int]) -> bytes:
    encoded, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not encoded:
        raise ValueError(f"OpenCV could not encode a {suffix} image")
    return data.tobytes()


def data_uri(data: bytes, media_type: str = "image/jpeg") -> str:
    """The content of a file as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


class FrameStore:
    """Small images of the frames of one video, as JPEG in one temporary file, which ends with this object."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it is needed as long as this object
        self._ends = [0]  # of each image in the file

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, image: NDArray[np.uint8]) -> None:
        """Store the image of the next frame."""
        self._file.seek(self._ends[-1])
        self._ends.append(self._ends[-1] + self._file.write(encode_jpeg(image)))

    def __getitem__(self, frame: int) -> NDArray[np.uint8]:
        """The image of a frame."""
        self._file.seek(self._ends[frame])
        data = self._file.read(self._ends[frame + 1] - self._ends[frame])
        image = decode_image(f"frame {frame}", data, ("JPEG",), cv2.IMREAD_COLOR)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
