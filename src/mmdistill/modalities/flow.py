"""Optical flow: displacements (x, y) in px."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmdistill.modalities.base import Modality, ModalitySpec, ReaderOptions

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmdistill.data.readers.base import Reader


class FlowModality(Modality):
    """Stored as one .npy file or two images per pair of frames (k, k + 1). Statistics come from the dataset config."""

    name = "flow"
    channels = 2
    compensations = ("median",)
    is_frame_pair = True
    pattern_fields = ("video", "frame")
    optional_pattern_fields = ("axis",)

    def open_reader(self, root: Path, options: ReaderOptions) -> "Reader":
        """A `FlowImageReader` if the options have a bound, else a `FlowReader`."""
        from mmdistill.data.readers.flow import FlowReader
        from mmdistill.data.readers.flow_images import FlowImageReader

        if options.flow_bound is not None:
            bound, axes = options.flow_bound, options.flow_axes
            return FlowImageReader(
                root, **{**options.frame_files, "pattern": options.pattern or ""}, bound=bound, axes=axes
            )
        return FlowReader(root, **options.frame_files)

    def preprocess(self, clips: "Tensor", crop_boxes: "Tensor", spec: ModalitySpec, size: tuple[int, int]) -> "Tensor":
        """Flow (B, T, 2, H, W) in px of the stored frame -> float32 (B, 2, T, h, w) in px of the input, normalized.

        ``spec.compensate="median"`` first subtracts the median displacement of each stored frame, which is about that
        of the background if the camera pans. A resize scales the displacements. A horizontal flip negates their x
        component.
        """
        import torch

        from mmdistill.models.preprocessing import crop_resize_flip, normalize, subtract_median, to_device

        flow = clips.float()
        if spec.compensate == "median":
            flow = subtract_median(flow)
        x = crop_resize_flip(flow.transpose(1, 2), crop_boxes, size)
        boxes = crop_boxes.float()
        scale = torch.tensor(size[::-1]) / boxes[:, [3, 2]]  # (B, 2)
        scale[:, 0] *= 1 - 2 * boxes[:, 4]
        return normalize(x * to_device(scale, x.device)[:, :, None, None, None], spec.mean, spec.std)

    def display_max(self, values: "Tensor") -> float:
        """The largest magnitude of a displacement."""
        return float(values.pow(2).sum(0).sqrt().max())

    def to_image(self, values: "Tensor") -> "np.ndarray":
        """Hue encodes the direction, saturation the magnitude. (2, T, h, w) -> (T, h, w, 3)."""
        import torch
        from matplotlib.colors import hsv_to_rgb

        angle = torch.atan2(values[1], values[0]) / (2 * torch.pi) % 1
        magnitude = values.pow(2).sum(0).sqrt().clamp(max=1)
        image: np.ndarray = hsv_to_rgb(torch.stack((angle, magnitude, torch.ones_like(magnitude)), dim=3).numpy())
        return image
