"""A small video in the tennis layout: a moving bright dot, its flow, and a joint at its position."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmdistill.data.readers.base import Reader
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader

LEFT_WRIST = 9
QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


@dataclass(frozen=True)
class DotVideo:
    """A written video of a moving dot, and readers of its files."""

    root: Path
    size: tuple[int, int]
    positions: np.ndarray  # (T, 2) x, y of the dot in frame k, px

    def readers(self) -> dict[str, Reader]:
        return {
            "rgb": RgbReader(self.root / "frames", frame_size=self.size),
            "flow": FlowReader(self.root / "flow", frame_size=self.size),
            "skeleton": SkeletonReader(self.root / "skeleton", frame_size=self.size),
        }


def write_dot_video(root: Path, *, video: str = "dot", size: tuple[int, int] = (64, 96), frames: int = 24) -> DotVideo:
    """Frame k has a dot at positions[k], flow k its displacement, skeleton row k a left wrist (img_shape: 4 x size)."""
    height, width = size
    k = np.arange(frames)
    positions = np.stack([14 + 3 * k, 20 + (k * 7) % 25], axis=1)
    for folder in ("frames", "flow"):
        (root / folder / video).mkdir(parents=True, exist_ok=True)
    (root / f"skeleton/{video}").parent.mkdir(parents=True, exist_ok=True)
    joints = np.zeros((2, frames, 17, 2), np.float32)
    scores = np.zeros((2, frames, 17), np.float32)
    for i, (x, y) in enumerate(positions):
        image = np.full((height, width, 3), 40, np.uint8)
        image[y - 1 : y + 2, x - 1 : x + 2] = (0, 0, 255)  # BGR: a red dot
        cv2.imwrite(str(root / f"frames/{video}/{i:06d}.jpg"), image, QUALITY)
        joints[0, i, LEFT_WRIST] = 4 * (x + 0.5) - 0.5, 4 * (y + 0.5) - 0.5
        scores[0, i, LEFT_WRIST] = 1
        if i + 1 < frames:
            flow = np.zeros((2, height, width), np.float32)
            flow[:, y - 1 : y + 2, x - 1 : x + 2] = (positions[i + 1] - positions[i])[:, None, None]
            write_flow(root / f"flow/{video}/pair_{i:05d}.npy", flow, dtype="float32")
    entry = {
        "keypoint": joints,
        "keypoint_score": scores,
        "total_frames": frames,
        "img_shape": (4 * height, 4 * width),
    }
    (root / f"skeleton/{video}.pkl").write_bytes(pickle.dumps(entry))
    return DotVideo(root, size, positions)
