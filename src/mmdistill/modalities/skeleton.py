"""Skeletons: one heat-map in [0, 1] per joint."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmdistill.modalities.base import Modality, ModalitySpec, ReaderOptions

if TYPE_CHECKING:
    from torch import Tensor

    from mmdistill.data.readers.base import Reader

# COCO-17: a horizontal flip exchanges left and right eyes, ears, shoulders, elbows, wrists, hips, knees and ankles.
FLIPPED_JOINTS: tuple[int, ...] = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


class SkeletonModality(Modality):
    """Stored as pickle files, one per video, with COCO-17 keypoints. Heat-maps are rendered on the device."""

    name = "skeleton"
    channels = len(FLIPPED_JOINTS)
    target = "pixel"
    input_stride = 4
    sigma = 0.6
    pattern_fields = ("video",)

    def open_reader(self, root: Path, options: ReaderOptions) -> "Reader":
        """A `SkeletonReader`."""
        from mmdistill.data.readers.skeleton import SkeletonReader

        o = options
        return SkeletonReader(
            root, frame_size=o.frame_size, max_persons=o.max_persons, pattern=o.pattern, file_format=o.skeleton
        )

    def preprocess(self, clips: "Tensor", crop_boxes: "Tensor", spec: ModalitySpec, size: tuple[int, int]) -> "Tensor":
        """Keypoints (B, T, M, J, 3), rows (x, y, score) in stored-frame px -> float32 (B, J, T, h, w)."""
        from mmdistill.models.preprocessing import render_heatmaps, transform_keypoints

        joints = transform_keypoints(clips.float(), crop_boxes, size, flipped_joints=FLIPPED_JOINTS)
        if spec.sigma is None:
            raise ValueError(f"{spec.name}: sigma is not set")
        return render_heatmaps(joints, size, sigma=spec.sigma, mean=spec.mean, std=spec.std)
