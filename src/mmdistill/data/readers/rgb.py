"""RGB frames: one JPEG file per frame."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdistill.data.readers.base import FrameError, FrameFileReader, FrameSizeError, file_errors
from mmdistill.errors import format_count

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PADDING = b"\0\r\n "  # some encoders write it after the end marker


class RgbReader(FrameFileReader):
    """JPEG frames: uint8 (T, H, W, 3), RGB."""

    name = "rgb"
    pattern = "{video}/{frame:06d}.jpg"

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        height, width = self.frame_size
        out = np.empty((len(frames), height, width, 3), np.uint8)
        for position, path in enumerate(self.path(video, frame) for frame in frames):
            image = read_jpeg(path)
            if image.shape != (height, width, 3):
                found = f"{image.shape[0]} x {image.shape[1]}"
                raise FrameSizeError(f"{path}: {found} px, expected {height} x {width} from data_module.frame_size")
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out[position])
        return out


def read_jpeg(path: str) -> np.ndarray:
    """Read a JPEG file. uint8 (H, W, 3), BGR.

    OpenCV decodes a truncated file to an image of full size with gray rows, so the end marker is checked first.

    Raises:
        FrameError: the file is missing, empty, truncated, damaged or not a JPEG.
    """
    with file_errors(path, "rgb"):
        data = Path(path).read_bytes()
    if not data:
        raise FrameError(f"{path}: empty file")
    if not data.startswith(JPEG_START):
        raise FrameError(f"{path}: not a JPEG")
    if not data.endswith(JPEG_END) and not data.rstrip(PADDING).endswith(JPEG_END):
        raise FrameError(f"{path}: truncated JPEG ({format_count(len(data), 'byte')}, no end marker)")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise FrameError(f"{path}: damaged JPEG")
    return image
