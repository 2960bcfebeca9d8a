"""RGB frames: one JPEG file per frame."""

from collections.abc import Sequence

import cv2
import numpy as np

from mmdistill.data.motion import frame_difference
from mmdistill.data.readers.base import FrameFileReader, FrameSizeError
from mmdistill.data.readers.image_file import decode_image


class RgbReader(FrameFileReader):
    """JPEG frames: uint8 (T, H, W, 3), RGB."""

    name = "rgb"
    pattern = "{video}/{frame:06d}.jpg"

    def motion_energy(self, clip: np.ndarray) -> np.ndarray:
        """The differences of consecutive frames."""
        return frame_difference(clip)

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        height, width = self.frame_size
        out = np.empty((len(frames), height, width, 3), np.uint8)
        for position, (path, data) in enumerate(self.read_files(video, frames)):
            image = decode_image(path, data, ("JPEG",), cv2.IMREAD_COLOR)
            if image.shape != (height, width, 3):
                found = f"{image.shape[0]} x {image.shape[1]}"
                expected = f"{height} x {width} from data_module.frame_size"
                raise FrameSizeError(f"{path}: {found} px, expected {expected}", image.shape[:2])
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out[position])
        return out
