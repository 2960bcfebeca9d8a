"""RGB frames: colors in [0, 1]."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmdistill.modalities.base import Modality, ModalitySpec, ReaderOptions

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mmdistill.data.readers.base import Reader


class RgbModality(Modality):
    """Stored as JPEG files, one per frame. The default statistics are those of ImageNet, which VideoMAE uses."""

    name = "rgb"
    channels = 3
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    pattern_fields = ("video", "frame")

    def open_reader(self, root: Path, options: ReaderOptions) -> "Reader":
        """A `RgbReader`."""
        from mmdistill.data.readers.rgb import RgbReader

        return RgbReader(root, **options.frame_files)

    def preprocess(self, clips: "Tensor", crop_boxes: "Tensor", spec: ModalitySpec, size: tuple[int, int]) -> "Tensor":
        """uint8 (B, T, H, W, 3) -> float32 (B, 3, T, h, w)."""
        from mmdistill.models.preprocessing import crop_resize_flip, normalize

        x = crop_resize_flip(clips.permute(0, 4, 1, 2, 3), crop_boxes, size).float().div_(255)
        return normalize(x, spec.mean, spec.std)

    def display_max(self, values: "Tensor") -> float:
        """1, which is white."""
        return 1.0

    def to_image(self, values: "Tensor") -> "np.ndarray":
        """The colors. (3, T, h, w) -> (T, h, w, 3)."""
        image: np.ndarray = values.permute(1, 2, 3, 0).numpy()
        return image

    def energy_to_image(self, values: "Tensor") -> "np.ndarray":
        """The energy of each color channel as that color. (3, T, h, w) -> (T, h, w, 3)."""
        return self.to_image(values)
