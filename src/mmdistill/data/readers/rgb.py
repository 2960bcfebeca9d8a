"""RGB frames: one JPEG file per frame."""

from collections.abc import Sequence

import cv2
import numpy as np

from mmdistill.data.readers.base import FrameError, _FileReader

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


PADDING = b"\0\r\n "  # that some writers add after the end


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
