"""Optical flow: one file per frame pair."""

from collections.abc import Sequence

import numpy as np
import torch

from mmdistill.data.readers.base import FrameError, FrameFileReader, FrameSizeError
from mmdistill.data.readers.flow_file import read_flow


class FlowReader(FrameFileReader):
    """Optical flow: float16 (T, 2, H, W), displacement (x, y) in px of the stored frame."""

    name = "flow"
    pattern = "{video}/pair_{frame:05d}.npy"

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        shape = (2, *self.frame_size)
        out = np.empty((len(frames), *shape), np.float16)
        out_tensor = torch.from_numpy(out)
        for position, path in enumerate(self.path(video, frame) for frame in frames):
            flow = read_flow(path)
            if flow.shape != shape:
                raise FrameSizeError(f"{path}: shape {flow.shape}, expected {shape} from data_module.frame_size")
            out_tensor[position].copy_(torch.from_numpy(flow))  # 20 times faster than NumPy's conversion to float16
            if ((out[position].view(np.uint16) & 0x7C00) == 0x7C00).any():  # all exponent bits set: infinite or NaN
                raise FrameError(f"{path}: NaN, infinite or too large for float16; write this flow file again")
        return out
