"""Stored heat-maps of keypoints: one ``.npy`` file per frame."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdistill.console import log_once
from mmdistill.data.readers.base import FrameError, FrameFileReader
from mmdistill.data.readers.npy_file import load_npy
from mmdistill.data.readers.skeleton_format import SkeletonFormat

VALUE_TOLERANCE = 1e-3  # of resized heat-maps outside of 0 to 1


class HeatmapReader(FrameFileReader):
    """Stored heat-maps: float16 (T, J, h, w) in [0, 1]. A heat-map covers the whole stored frame.

    A file is ``[J, h, w]``, or ``[h, w, J]``, which is logged once. uint8 is 0 to 255, and float is 0 to `score_max` of
    the format.

    Args:
        root: see `FrameFileReader`, also for the next three.
        frame_size: see `FrameFileReader`.
        pattern: see `FrameFileReader`.
        frame_number_offset: see `FrameFileReader`.
        size: (height, width) of the heat-maps in px.
        file_format: its `num_joints` is J.
    """

    name = "heat-map"
    pattern = "{video}/{frame:06d}.npy"

    def __init__(
        self,
        root: Path | str,
        *,
        frame_size: tuple[int, int],
        pattern: str | None = None,
        frame_number_offset: int = 0,
        size: tuple[int, int],
        file_format: SkeletonFormat,
    ) -> None:
        super().__init__(root, frame_size=frame_size, pattern=pattern, frame_number_offset=frame_number_offset)
        self.size, self.file_format = size, file_format

    @property
    def settings(self) -> tuple[object, ...]:
        """See `Reader.settings`."""
        return (self.size, self.file_format)

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """See `Reader.read`."""
        out = np.empty((len(frames), self.file_format.num_joints, *self.size), np.float16)
        for position, (path, data) in enumerate(self.read_files(video, frames)):
            out[position] = self._convert(path, load_npy(path, data))
        return out

    def motion_energy(self, clip: np.ndarray) -> np.ndarray:
        """The change of the heat-maps to the next frame, summed over joints; see `Reader.motion_energy`."""
        energy = np.zeros((len(clip), *self.frame_size), np.float32)
        for k in range(len(clip) - 1):
            change = np.abs(clip[k + 1].astype(np.float32) - clip[k]).sum(axis=0)
            energy[k] = cv2.resize(change, self.frame_size[::-1], interpolation=cv2.INTER_NEAREST)
        energy[len(clip) - 1] = energy[len(clip) - 2]
        return energy

    def _convert(self, path: str, stored: np.ndarray) -> np.ndarray:
        """The content of a file as float32 (J, h, w) in [0, 1]. Raises `FrameError` if it is something else."""
        expected = (self.file_format.num_joints, *self.size)
        if stored.shape == (*self.size, expected[0]) != expected:
            text = f"heat-maps of shape [height, width, joints], such as {path}: read as [joints, height, width]"
            log_once(text, key=f"{self.root}: axes of heat-maps")
            stored = stored.transpose(2, 0, 1)
        if stored.shape != expected:
            raise FrameError(
                f"{path}: shape {stored.shape}, expected {expected}, the number of joints and heatmap_size; correct "
                "joints or heatmap_size in data_module.modalities, or write this file again"
            )
        if stored.dtype == np.uint8:
            return stored.astype(np.float32) / 255
        if stored.dtype.kind != "f":
            raise FrameError(f"{path}: type {stored.dtype}; heat-maps must be float, or uint8 from 0 to 255")
        heatmaps = stored.astype(np.float32) / self.file_format.score_max
        low, high = float(heatmaps.min()), float(heatmaps.max())
        if not np.isfinite([low, high]).all():
            raise FrameError(f"{path}: NaN or infinite; write this heat-map file again")
        if low < -VALUE_TOLERANCE or high > 1 + VALUE_TOLERANCE:
            largest = self.file_format.score_max
            raise FrameError(
                f"{path}: values from {low * largest:.4g} to {high * largest:.4g}, expected 0 to {largest:g}; set "
                f"{self.file_format.key}score_max to the largest possible value, or write the heat-maps from 0 to 1"
            )
        clipped: np.ndarray = heatmaps.clip(0, 1)
        return clipped
