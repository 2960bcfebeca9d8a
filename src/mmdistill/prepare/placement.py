"""Placement of source frames in stored frames of one size: by the aspect ratio of the source, padded, or cropped."""

from dataclasses import dataclass

import cv2
import numpy as np

FITS = ("pad", "crop")


@dataclass(frozen=True)
class Placement:
    """A source frame is reduced to `scaled`, and its top left corner lies at `offset` in a stored frame of `stored`.

    All values are (vertical, horizontal) in px. A negative offset crops, a positive one pads with black.
    """

    stored: tuple[int, int]
    scaled: tuple[int, int]
    offset: tuple[int, int] = (0, 0)

    def place(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) of the source -> uint8 of the stored size."""
        image: np.ndarray = cv2.resize(pixels, self.scaled[::-1], interpolation=cv2.INTER_AREA)
        if self.scaled == self.stored:
            return image
        out = np.zeros((*self.stored, 3), np.uint8)
        sources, targets = [], []
        for size, stored, offset in zip(self.scaled, self.stored, self.offset, strict=True):
            count = min(size, stored)
            sources.append(slice(max(-offset, 0), max(-offset, 0) + count))
            targets.append(slice(max(offset, 0), max(offset, 0) + count))
        out[tuple(targets)] = image[tuple(sources)]
        return out

    def place_joints(self, joints: np.ndarray, source: tuple[int, int]) -> np.ndarray:
        """(..., 3) x, y, score in px of a source of (height, width) -> px of the stored frame; zeros outside."""
        factors = np.array([self.scaled[1] / source[1], self.scaled[0] / source[0]])
        out = joints.copy()
        out[..., :2] = (joints[..., :2] + 0.5) * factors - 0.5 + self.offset[::-1]
        inside = ((out[..., :2] >= -0.5) & (out[..., :2] < np.array(self.stored[::-1]) - 0.5)).all(axis=-1)
        out[~inside | (joints[..., 2] == 0)] = 0
        return out


def scale_to_height(source: tuple[int, int], height: int) -> Placement:
    """Placement of a source of (height, width) px without padding; the width follows its aspect ratio."""
    size = (height, max(1, round(source[1] * height / source[0])))
    return Placement(size, size)


def fit_into(source: tuple[int, int], stored: tuple[int, int], fit: str) -> Placement:
    """Placement in the center of a stored frame: ``pad`` shows the whole source, ``crop`` fills the stored frame."""
    ratios = [target / size for size, target in zip(source, stored, strict=True)]
    ratio = min(ratios) if fit == "pad" else max(ratios)
    height, width = (max(1, round(size * ratio)) for size in source)
    return Placement(stored, (height, width), ((stored[0] - height) // 2, (stored[1] - width) // 2))
